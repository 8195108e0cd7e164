"""Results come in order, errors in their turn, and a thread that hangs is told of."""

import threading
import time
from collections.abc import Callable

import pytest

from sdx.data.ahead import Ahead, Overdue

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("num_threads", [1, 3])
def test_results_in_order_whichever_is_done_first(num_threads: int):
    def slow_when_even(number: int) -> int:
        time.sleep(0 if number % 2 else 0.003)
        return number

    ahead = Ahead(slow_when_even, 5, num_threads=num_threads)
    assert [next(ahead) for _ in range(10)] == [*range(5, 15)]
    ahead.close()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_no_more_is_done_than_there_are_threads(num_threads: int):
    done: list[int] = []
    ahead = Ahead(done.append, 0, num_threads=num_threads)
    next(ahead)
    wait_for(lambda: len(done) == num_threads + 1)
    time.sleep(0.02)
    assert len(done) == num_threads + 1
    ahead.close()


def test_an_error_is_raised_in_its_turn_with_its_traceback():
    def third_fails(number: int) -> int:
        if number == 2:
            raise RuntimeError("disk on fire")
        return number

    ahead = Ahead(third_fails, 0, num_threads=3)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(RuntimeError, match="disk on fire") as caught:
        next(ahead)
    assert "third_fails" in [entry.name for entry in caught.traceback]
    with pytest.raises(ValueError, match="closed"):
        next(ahead)
    ahead.close()


def test_a_thread_that_hangs_is_told_of_and_keeps_nothing_from_ending():
    hung = threading.Event()

    def hang_at_two(number: int) -> int:
        if number == 2:
            hung.wait()
        return number

    ahead = Ahead(hang_at_two, 1, num_threads=2, timeout_s=0.05)
    assert next(ahead) == 1
    with pytest.raises(Overdue) as caught:
        next(ahead)
    assert caught.value.number == 2
    assert "in hang_at_two" in caught.value.stack and "hung.wait()" in caught.value.stack
    ahead.close()
    assert not hung.is_set(), "nobody waited for it"
    hung.set()


def test_close_ends_the_threads_and_nothing_comes_after():
    ahead = Ahead(str, 0, num_threads=3, name="of this test")
    next(ahead)
    assert count_threads("of this test") == 3
    ahead.close()
    assert count_threads("of this test") == 0
    with pytest.raises(ValueError, match="closed"):
        next(ahead)


def count_threads(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 300
    while not is_so() and time.monotonic() < until:
        time.sleep(0.002)
    assert is_so()
