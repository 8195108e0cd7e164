"""The order of an epoch is a bijection, and draws are fair, independent and functions of their
names.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdx.data.captions import choose_caption
from sdx.data.draws import randint, shuffled, uniform

pytestmark = pytest.mark.fast

seeds = st.integers(0, 2**63)
epochs = st.integers(0, 2**40)


@given(length=st.integers(1, 700), seed=seeds, epoch=epochs)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_epoch_holds_each_index_once(length: int, seed: int, epoch: int):
    order = [shuffled(i, length, seed=seed, epoch=epoch) for i in range(length)]
    assert sorted(order) == list(range(length))


@given(length=st.integers(2, 2**40), seed=seeds, epoch=epochs, data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_two_positions_meet_in_long_epochs(
    length: int, seed: int, epoch: int, data: st.DataObject
):
    some = data.draw(st.lists(st.integers(0, length - 1), max_size=30, unique=True))
    places = [shuffled(i, length, seed=seed, epoch=epoch) for i in some]
    assert len(set(places)) == len(some)
    assert all(0 <= place < length for place in places)


def test_outside_positions_are_refused():
    for position in (-1, 5):
        with pytest.raises(IndexError):
            shuffled(position, 5, seed=0, epoch=0)


@pytest.mark.parametrize("length", [3, 4])
def test_every_order_of_a_few_is_equally_likely(length: int):
    orders = Counter(
        tuple(shuffled(i, length, seed=1, epoch=epoch) for i in range(length))
        for epoch in range(2400)
    )
    num_orders = {3: 6, 4: 24}[length]
    assert len(orders) == num_orders
    expected = 2400 / num_orders
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_square < {3: 20.5, 4: 49.7}[length], "p = 0.001"


def test_orders_differ_between_seeds_and_epochs_and_from_the_sources():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(shuffled(i, 100, seed=seed, epoch=epoch) for i in range(100))

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)} | {tuple(range(100))}
    assert len(orders) == 26
    displaced = sum(abs(i - place) for i, place in enumerate(order(0, 0))) / 100
    assert 25 < displaced < 42, "a random order moves an example by a third of the length"


def test_uniform_numbers_fill_the_interval_evenly():
    numbers = [uniform("a", seed=0, epoch=0, index=i) for i in range(10_000)]
    assert all(0 <= number < 1 for number in numbers)
    counts = Counter(int(number * 10) for number in numbers)
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 27.9, "p = 0.001"


def test_streams_seeds_epochs_and_indices_are_independent():
    def bits(stream: str = "a", seed: int = 0, epoch: int = 0, shift: int = 0) -> list[bool]:
        draws = (uniform(stream, seed=seed, epoch=epoch, index=i + shift) for i in range(4000))
        return [draw < 0.5 for draw in draws]

    first = bits()
    assert first == bits()
    for other in (bits("b"), bits(seed=1), bits(epoch=1), bits(shift=1)):
        agreeing = sum(a == b for a, b in zip(first, other, strict=True))
        assert 1850 < agreeing < 2150


def test_values_are_fixed_for_all_time():
    """A run resumed with a later sdx must draw what the run before it drew."""
    order = [shuffled(i, 10, seed=0, epoch=0) for i in range(10)]
    assert order == [4, 5, 3, 1, 6, 7, 0, 2, 8, 9]
    assert randint("caption", 1000, seed=7, epoch=3, index=5) == 837


def test_captions_are_chosen_evenly_and_dropped_at_their_rate():
    captions = ("a", "b", "c")

    def chosen(dropout: float, epoch: int = 0, captions: tuple[str, ...] = captions) -> list[str]:
        return [
            choose_caption(captions, dropout=dropout, seed=0, epoch=epoch, index=i)
            for i in range(6000)
        ]

    kept = chosen(0.0)
    assert set(kept) == set(captions)
    assert all(1880 < count < 2120 for count in Counter(kept).values())
    assert kept == chosen(0.0) and kept != chosen(0.0, epoch=1)
    dropped = chosen(0.1)
    assert 530 < dropped.count("") < 670
    assert all(new in ("", old) for new, old in zip(dropped, kept, strict=True))
    assert set(chosen(0.0, captions=("only",))) == {"only"}
