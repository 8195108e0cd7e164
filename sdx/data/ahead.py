"""Work done in threads before it is asked for, and handed out in order."""

import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

_JOIN_S = 10.0  # for what the threads are at; they are daemons, one that hangs keeps nothing


class Overdue(TimeoutError):
    """A result did not come in time; `stack` is where its thread stands."""

    def __init__(self, number: int, stack: str):
        super().__init__(number, stack)
        self.number = number
        self.stack = stack


class Ahead(Iterator[T], Generic[T]):
    """`work(number)` for first, first + 1, and so on, each done by one of `num_threads` threads.

    A thread begins its next number when its last result was taken, so that at most `num_threads`
    results exist that nobody has asked for. An error of `work` is raised in its turn, with its
    traceback, and is the last that comes. Where a result is asked for and does not come within
    `timeout_s`, `Overdue` is raised.
    """

    def __init__(
        self,
        work: Callable[[int], T],
        first: int,
        *,
        num_threads: int,
        timeout_s: float | None = None,
        name: str = "sdx-ahead",
    ):
        self._timeout_s = timeout_s
        self._join_s = _JOIN_S
        self._next = first
        self._threads = [
            _Thread(work, itertools.count(first + i, num_threads), f"{name}-{i}")
            for i in range(num_threads)
        ]
        self._turns = itertools.cycle(self._threads)
        for thread in self._threads:
            thread.start()

    def __next__(self) -> T:
        if self._threads[0].is_told_to_end:
            raise ValueError("closed: nothing more can be asked for")
        thread = next(self._turns)
        try:
            result = thread.take(self._next, self._timeout_s)
        except BaseException as error:
            self._join_s = 0.0 if isinstance(error, Overdue) else self._join_s
            self._tell_to_end()
            raise
        self._next += 1
        return result

    def close(self) -> None:
        """Ends the threads when they have done what they are at, and waits for that a while; not
        where a result is overdue.
        """
        until = time.monotonic() + self._join_s
        self._tell_to_end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _tell_to_end(self) -> None:
        for thread in self._threads:
            thread.tell_to_end()


class _Thread(threading.Thread, Generic[T]):
    def __init__(self, work: Callable[[int], T], numbers: Iterator[int], name: str):
        # A daemon: one that hangs in a read must not keep the process from ending.
        super().__init__(name=name, daemon=True)
        self.is_told_to_end = False
        self._work = work
        self._numbers = numbers
        self._results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(1)

    def run(self) -> None:
        for number in self._numbers:
            self._room.acquire()
            if self.is_told_to_end:
                return
            try:
                self._results.put((self._work(number), None))
            except BaseException as error:
                self._results.put((None, error))
                return

    def take(self, number: int, timeout_s: float | None) -> T:
        """The next result, which is that of `number`."""
        try:
            result, error = self._results.get(timeout=timeout_s)
        except Empty:
            raise Overdue(number, self.stack()) from None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        self._room.release()
        return result  # pyright: ignore[reportReturnType]  # None only where None was made

    def tell_to_end(self) -> None:
        self.is_told_to_end = True
        self._room.release()

    def stack(self) -> str:
        """Where the thread stands, as in a traceback."""
        frame = sys._current_frames().get(self.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "  the thread has ended\n"
