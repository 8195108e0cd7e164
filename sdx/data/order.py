"""Which examples a step trains on: functions of (seed, step) alone, the same for all hosts.

A resume needs only the step, and a host takes the rows at its place of a batch that other hosts, or
more of them, do not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sdx.data.buckets import Buckets
from sdx.data.draws import shuffled

Place = tuple[int, int]
"""Epoch and index of one row."""


@dataclass(frozen=True)
class Places:
    """The rows of one step's global batch, and how many of them count; the rest repeat others."""

    rows: Sequence[Place]
    num_counted: int


@runtime_checkable
class Order(Protocol):
    """Picklable for loader processes."""

    def __call__(self, step: int, rows: Sequence[int]) -> Places:
        """These rows, ascending, of the batch of `step`."""
        ...


@dataclass(frozen=True)
class EndlessOrder:
    """The epochs lie one after the other, and step k takes the positions [k·B, (k+1)·B) of that
    line.

    So a batch may hold the end of one epoch and the beginning of the next, no example is dropped,
    and each is seen exactly once an epoch.
    """

    length: int
    batch_size: int
    shuffle: bool
    seed: int

    def __call__(self, step: int, rows: Sequence[int]) -> Places:
        """As `Order`."""
        first = step * self.batch_size
        return Places([self._place(first + row) for row in rows], len(rows))

    def _place(self, position: int) -> Place:
        epoch, offset = divmod(position, self.length)
        if self.shuffle:
            offset = shuffled(offset, self.length, seed=self.seed, epoch=epoch)
        return epoch, offset


@dataclass(frozen=True)
class BucketOrder:
    """Every batch holds examples of one bucket, and every epoch each example once.

    In an epoch each bucket's examples are put in an order of their own and cut into batches; the
    last batch of a bucket is filled up with examples of it that do not count. The batches of all
    buckets then come in one order.
    """

    buckets: Buckets
    batch_size: int
    shuffle: bool
    seed: int

    def __call__(self, step: int, rows: Sequence[int]) -> Places:
        """As `Order`."""
        counts = self.buckets.num_batches(self.batch_size)
        epoch, batch = divmod(step, sum(counts))
        if self.shuffle:
            batch = shuffled(batch, sum(counts), seed=self.seed, epoch=epoch, stream="buckets")
        bucket = 0
        while batch >= counts[bucket]:
            batch -= counts[bucket]
            bucket += 1
        members = self.buckets.members[bucket]
        positions = [batch * self.batch_size + row for row in rows]
        places = [(epoch, int(members[self._offset(p, len(members), epoch)])) for p in positions]
        return Places(places, sum(p < len(members) for p in positions))

    def _offset(self, position: int, length: int, epoch: int) -> int:
        offset = position % length
        return shuffled(offset, length, seed=self.seed, epoch=epoch) if self.shuffle else offset
