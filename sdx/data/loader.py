"""Batches of training examples, read ahead; which examples a step has is order.py's."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Float32, Int32, Int64, UInt8

from sdx.config.schema import DataConfig
from sdx.data.ahead import Ahead, Overdue
from sdx.data.buckets import Buckets
from sdx.data.cache.rows import CachedSource, cached_rows
from sdx.data.captions import choose_caption
from sdx.data.images import training_image
from sdx.data.order import BucketOrder, EndlessOrder, Order, Place
from sdx.data.source import (
    BadImage,
    BadImageError,
    DataError,
    Example,
    Source,
    count_reasons,
)
from sdx.data.tokenizer import Tokenizer
from sdx.data.workers import Workers

_NUM_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class HostBatch:
    """This host's part of the global batch of one step.

    `images` are RGB, 0 to 255; where a cache is read there are `moments` of the VAE instead, and
    `context`, text states, where it holds them. `weights` are 1, and 0 for an example that could
    not be read any more, whose image is black and caption empty, and for one that only fills the
    last batch of its bucket. `indices` are the source's,
    `epochs` count from 0. `bad_images` are the unreadable ones.
    """

    step: int
    tokens: Int32[np.ndarray, "b s"]
    weights: Float32[np.ndarray, " b"]
    indices: Int64[np.ndarray, " b"]
    epochs: Int64[np.ndarray, " b"]
    bad_images: tuple[BadImage, ...]
    images: UInt8[np.ndarray, "b H W 3"] | None = None
    moments: Float16[np.ndarray, "b h w m"] | None = None
    context: Float16[np.ndarray, "b s d"] | None = None


def make_loader(
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    resolution: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    buckets: Buckets | None = None,
) -> "Loader":
    """An endless iterator over this host's batches from `start_step` on, reading ahead.

    `rows`, ascending, are those of the global batch that this host's devices hold, by default all.
    Images are square, or of the shape of their bucket.
    """
    read: Rows
    if isinstance(source, CachedSource):
        read = cached_rows(source, tokenizer, caption_dropout=data.caption_dropout, seed=seed)
    else:
        read = pixel_rows(
            source, tokenizer, data, seed=seed, resolution=resolution, buckets=buckets
        )
    order: Order = EndlessOrder(len(read), global_batch_size, data.shuffle, seed)
    if buckets is not None:
        order = BucketOrder(buckets, global_batch_size, data.shuffle, seed)
    host_rows = range(global_batch_size) if rows is None else rows
    return Loader(
        _ReadBatch(read, order, host_rows),
        start_step,
        num_workers=data.num_workers,
        max_bad_fraction=data.max_bad_fraction,
        timeout_s=data.worker_timeout_s,
    )


def pixel_rows(
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    seed: int,
    resolution: int,
    buckets: Buckets | None = None,
) -> "PixelRows":
    """Rows of a source's images, transformed as `data` says."""
    return PixelRows(
        source=source,
        tokenizer=tokenizer,
        resolution=resolution,
        interpolation=data.interpolation.value,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        caption_dropout=data.caption_dropout,
        seed=seed,
        buckets=buckets,
    )


class ReadAhead(Iterator[dict[str, Any]]):
    """`read(step)` for one step after the other, done before it is asked for, by threads or by
    processes that have threads; `close` stops them. Also a context manager.

    An error while reading is raised by `__next__` with its traceback. `DataError` is raised where a
    loader process died, and where nothing came for `timeout_s`.
    """

    def __init__(
        self,
        read: Callable[[int], dict[str, Any]],
        start_step: int,
        *,
        num_workers: int,
        timeout_s: float,
    ):
        self._timeout_s = timeout_s
        self._workers = Workers(read, start_step, num_workers) if num_workers else None
        self._batches: Ahead[dict[str, Any]] = Ahead(
            read if self._workers is None else self._workers.read,
            start_step,
            num_threads=1 if num_workers else _NUM_THREADS,
            timeout_s=timeout_s,
            name="sdx-loader",
        )

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self._batches)
        except Overdue as overdue:
            stack = overdue.stack
            if self._workers is not None:
                stack = self._workers.stacks()
                self._workers.kill()  # closing would wait for them
            raise DataError(
                f"data.worker_timeout_s={self._timeout_s:g}: no batch for step {overdue.number}"
                " came in that time. What is read hangs (a mounted or remote file system?) or takes"
                " longer than it may: then raise the limit. Start again and the run goes on"
                f" from its last checkpoint. Where reading stands:\n{stack}"
            ) from None

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Loader(Iterator[HostBatch]):
    """Batches in order; `close` stops its threads and processes. Also a context manager.

    Raises what `ReadAhead` does, and `DataError` where more than `max_bad_fraction` of all images
    became unreadable; those are kept in `bad_images`.
    """

    def __init__(
        self,
        read: "_ReadBatch",
        start_step: int,
        *,
        num_workers: int,
        max_bad_fraction: float,
        timeout_s: float,
    ):
        self.bad_images: dict[int, BadImage] = {}
        self._num_examples = len(read.rows)
        self._max_bad_fraction = max_bad_fraction
        self._batches = ReadAhead(read, start_step, num_workers=num_workers, timeout_s=timeout_s)

    def __next__(self) -> HostBatch:
        try:
            fields = next(self._batches)
            bad: dict[int, BadImage] = fields.pop("bad_images")
            self._count(bad)
        except BaseException:
            self.close()
            raise
        arrays = {name: np.asarray(value) for name, value in fields.items() if name != "step"}
        return HostBatch(step=fields["step"], bad_images=tuple(bad.values()), **arrays)

    def close(self) -> None:
        """Stops reading ahead. Batches handed out stay valid; no more can be asked for."""
        self._batches.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, bad: dict[int, BadImage]) -> None:
        self.bad_images |= bad
        check_bad_images(
            self.bad_images.values(), self._num_examples, self._max_bad_fraction, "while training"
        )


def check_bad_images(
    bad_images: Collection[BadImage], num_examples: int, max_bad_fraction: float, when: str
) -> None:
    """Raises `DataError` where too many images could not be read."""
    if len(bad_images) / num_examples > max_bad_fraction:
        found = tuple(bad_images)
        raise DataError(
            f"data.max_bad_fraction={max_bad_fraction}: {len(found)} of {num_examples} images"
            f" became unreadable {when} ({count_reasons(found)}); the first is {found[0].path}."
            " Restore the files and start again, or raise the limit.",
            found,
        )


@runtime_checkable
class Rows(Protocol):
    """What rows of a batch are read with; picklable for loader processes."""

    def __len__(self) -> int:
        """Examples in an epoch."""
        ...

    def read(self, places: Sequence[Place]) -> tuple[dict[str, np.ndarray], dict[int, BadImage]]:
        """Tokens, and images or what is cached of them, by their names in `HostBatch`; and by its
        index each example that could not be read, whose row is empty."""
        ...


@dataclass(frozen=True)
class PixelRows:
    """Images and tokens of a source."""

    source: Source
    tokenizer: Tokenizer
    resolution: int
    interpolation: str
    center_crop: bool
    random_flip: bool
    caption_dropout: float
    seed: int
    buckets: Buckets | None = None
    """The shapes of images; they are squares of `resolution` without. The rows of one reading are
    of one bucket."""

    def __len__(self) -> int:
        return len(self.source)

    def read(self, places: Sequence[Place]) -> tuple[dict[str, np.ndarray], dict[int, BadImage]]:
        """As `Rows`; an empty row is black and has the empty caption."""
        images = np.zeros((len(places), *self.size_of(places[0][1]), 3), np.uint8)
        captions = [""] * len(places)
        bad: dict[int, BadImage] = {}
        for row, (epoch, index) in enumerate(places):
            try:
                example = self.source[index]
            except BadImageError as error:
                bad[index] = BadImage(error.path, error.reason, error.detail)
                continue
            images[row] = self.image(example, epoch, index)
            captions[row] = choose_caption(
                example.captions,
                dropout=self.caption_dropout,
                seed=self.seed,
                epoch=epoch,
                index=index,
            )
        return {"images": images, "tokens": self.tokenizer.encode(captions)}, bad

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width of what the model is shown of an example."""
        if self.buckets is None:
            return self.resolution, self.resolution
        return self.buckets.size_of(index)

    def image(self, example: Example, epoch: int, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """What the model is shown of the example at `index` in this epoch."""
        return training_image(
            example.picture,
            self.size_of(index),
            interpolation=self.interpolation,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
            seed=self.seed,
            epoch=epoch,
            index=index,
        )


@dataclass(frozen=True)
class _ReadBatch:
    """This host's part of a step's batch, as a function; picklable for loader processes.

    It returns a dict, since Grain moves the arrays of a dict, not those of a dataclass, through
    shared memory.
    """

    rows: Rows
    order: Order
    host_rows: Sequence[int]

    def __call__(self, step: int) -> dict[str, Any]:
        places = self.order(step, self.host_rows)
        arrays, bad = self.rows.read(places.rows)
        epochs, indices = np.asarray(places.rows, np.int64).T
        is_counted = np.arange(len(places.rows)) < places.num_counted
        is_good = np.array([index not in bad for _, index in places.rows])
        return {
            **arrays,
            "step": step,
            "weights": np.float32(is_counted & is_good),
            "indices": indices,
            "epochs": epochs,
            "bad_images": bad,
        }
