"""Orders are functions of (seed, step): whatever the hosts, each example counts once an epoch."""

import pickle
from collections import Counter

import numpy as np
import pytest

from sdx.data.buckets import Buckets
from sdx.data.order import BucketOrder, EndlessOrder, Order

pytestmark = pytest.mark.fast

BATCH = 8
IN_BUCKETS = Buckets(((64, 32), (48, 48), (32, 64)), np.array([1] * 21 + [0] * 3 + [2] * 8 + [1]))
NUM_STEPS = 3 + 1 + 1  # 22 squares, 3 tall, 8 wide


def bucket_order(seed: int = 0, shuffle: bool = True) -> Order:
    return BucketOrder(IN_BUCKETS, BATCH, shuffle, seed)


def endless_order(seed: int = 0, shuffle: bool = True) -> Order:
    return EndlessOrder(33, BATCH, shuffle, seed)


ORDERS = {"endless": endless_order, "buckets": bucket_order}


def counted(order: Order, steps: range, num_hosts: int = 1) -> list[tuple[int, int, int]]:
    """(step, epoch, index) of all that counts, on all hosts."""
    share = BATCH // num_hosts
    return [
        (step, *place)
        for step in steps
        for host in range(num_hosts)
        for places in [order(step, range(host * share, (host + 1) * share))]
        for place in places.rows[: places.num_counted]
    ]


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_each_example_counts_once_an_epoch_on_any_number_of_hosts(num_hosts: int):
    for order, steps in [(endless_order(), range(33)), (bucket_order(), range(3 * NUM_STEPS))]:
        epochs = Counter((epoch, index) for _, epoch, index in counted(order, steps, num_hosts))
        complete = {place for place in epochs if place[0] < 3}
        assert complete == {(epoch, index) for epoch in range(3) for index in range(33)}
        assert set(epochs.values()) == {1}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("num_hosts", [2, 4, 8])
def test_hosts_together_have_the_batch_of_one(name: str, num_hosts: int):
    order = ORDERS[name]()
    assert counted(order, range(30), num_hosts) == counted(order, range(30))


@pytest.mark.parametrize("name", ORDERS)
def test_any_step_can_be_asked_for_first_and_in_another_process(name: str):
    order, rows = ORDERS[name](), range(BATCH)
    in_turn = [order(step, rows) for step in range(25)]
    copied = pickle.loads(pickle.dumps(ORDERS[name]()))
    assert [copied(step, rows) for step in reversed(range(25))] == in_turn[::-1]


@pytest.mark.parametrize("name", ORDERS)
def test_epochs_and_seeds_differ_and_without_shuffle_none_do(name: str):
    def epochs(seed: int = 0, shuffle: bool = True) -> list[list[int]]:
        all_of_it = counted(ORDERS[name](seed, shuffle), range(3 * NUM_STEPS))
        return [[index for _, epoch, index in all_of_it if epoch == e] for e in range(2)]

    assert epochs()[0] != epochs()[1] and epochs()[0] != epochs(seed=1)[0]
    assert epochs(shuffle=False)[0] == epochs(shuffle=False)[1] == epochs(1, False)[0]


def test_a_batch_is_of_one_bucket_and_filled_up_with_others_of_it():
    seen = Counter[int]()
    for step in range(4 * NUM_STEPS):
        places = bucket_order()(step, range(BATCH))
        buckets = {int(IN_BUCKETS.of_example[index]) for _, index in places.rows}
        assert len(buckets) == 1 and len(places.rows) == BATCH
        assert all(epoch == step // NUM_STEPS for epoch, _ in places.rows)
        seen[buckets.pop()] += 1
        if places.num_counted < BATCH:
            assert places.num_counted in (3, 22 % BATCH)
    assert seen == {0: 4, 1: 12, 2: 4}


def test_the_order_of_the_batches_is_shuffled_over_the_buckets():
    def buckets(epoch: int) -> list[int]:
        steps = range(epoch * NUM_STEPS, (epoch + 1) * NUM_STEPS)
        first = [bucket_order()(step, range(1)).rows[0][1] for step in steps]
        return [int(IN_BUCKETS.of_example[index]) for index in first]

    assert len({tuple(buckets(epoch)) for epoch in range(10)}) > 3
