"""From a source and from a cache's tokens to the records of shards: read ahead, encode, write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float16, Int32

from sdx.config import resolve
from sdx.config.schema import Config
from sdx.data.cache.records import EMPTY_CAPTION, Layout, MomentsRecord, pack_context
from sdx.data.cache.rows import CachedMoments
from sdx.data.cache.shards import Finisher, ShardWriter, finishing
from sdx.data.loader import PixelRows, ReadAhead, check_bad_images, pixel_rows
from sdx.data.source import BadImage, BadImageError, DataError, Source
from sdx.data.tokenizer import Tokenizer
from sdx.experiment.encoding.encoder import EncodeImages, EncodeTokens
from sdx.record.store import AnyPath

Progress = Callable[[int], None]
"""Told how many examples are done."""


class Interrupted(Exception):
    """A signal asked to stop."""


@dataclass(frozen=True)
class _Encoded:
    """An example as it is written; moments of no views if it is bad."""

    index: int
    moments: np.ndarray
    tokens: Int32[np.ndarray, "n s"]
    bad: BadImage | None


@dataclass(frozen=True)
class _ReadExamples:
    """Pixels of all views, and tokens of all captions, of the examples of one step; picklable for
    loader processes. Past the last example there is nothing.
    """

    rows: PixelRows
    layout: Layout
    pending: tuple[int, ...]
    """Shards, ascending."""
    num_views: int
    examples_at_once: int
    num_images: int

    def examples(self, step: int) -> list[int]:
        """Those of a step: the shards' examples in order."""
        first = step * self.examples_at_once
        positions = range(first, first + self.examples_at_once)
        per_shard = self.layout.shard_examples
        found = []
        for shard, offset in (divmod(position, per_shard) for position in positions):
            if shard < len(self.pending) and offset < len(
                self.layout.examples(self.pending[shard])
            ):
                found.append(self.pending[shard] * per_shard + offset)
        return found

    @property
    def num_steps(self) -> int:
        """Steps until all are read."""
        total = sum(len(self.layout.examples(shard)) for shard in self.pending)
        return -(-total // self.examples_at_once)

    def __call__(self, step: int) -> dict[str, Any]:
        examples, side = self.examples(step), self.rows.resolution
        images = np.zeros((self.num_images if examples else 0, side, side, 3), np.uint8)
        captions: list[str] = []
        counts = []
        bad: dict[int, BadImage] = {}
        for place, index in enumerate(examples):
            try:
                example = self.rows.source[index]
            except BadImageError as error:
                bad[index] = BadImage(error.path, error.reason, error.detail)
                counts.append(0)
                continue
            for view in range(self.num_views):
                images[place * self.num_views + view] = self.rows.image(example, view, index)
            captions += example.captions
            counts.append(len(example.captions))
        tokens = self.rows.tokenizer.encode(captions)
        return {"step": step, "images": images, "tokens": tokens, "counts": counts, "bad": bad}


def write_moments(
    source: Source,
    tokenizer: Tokenizer,
    config: Config,
    *,
    folder: AnyPath,
    digest: bytes,
    pending: Sequence[int],
    num_views: int,
    encode_images: EncodeImages,
    examples_at_once: int,
    num_images: int,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> None:
    """Writes these shards of the cache of moments; raises Interrupted between two batches."""
    data = config.data
    read = _ReadExamples(
        rows=pixel_rows(
            source, tokenizer, data, seed=config.run.seed, resolution=resolve.resolution(config)
        ),
        layout=Layout(len(source)),
        pending=tuple(pending),
        num_views=num_views,
        examples_at_once=examples_at_once,
        num_images=num_images,
    )
    ahead = ReadAhead(read, 0, num_workers=data.num_workers, timeout_s=data.worker_timeout_s)
    bad: list[BadImage] = []
    with ahead, finishing() as finisher:
        shards = _MomentsShards(folder, digest, read.layout, finisher)
        try:
            for done, example in enumerate(_encoded(read, ahead, encode_images, should_stop), 1):
                shards.add(example)
                if example.bad is not None:
                    bad.append(example.bad)
                    check_bad_images(bad, len(source), data.max_bad_fraction, "while encoding")
                progress(done)
        finally:
            shards.discard()


def _encoded(
    read: _ReadExamples,
    batches: Iterator[dict[str, Any]],
    encode_images: EncodeImages,
    should_stop: Callable[[], bool],
) -> Iterator[_Encoded]:
    """The examples in order; the devices are at the next ones while these are written."""
    before: tuple[dict[str, Any], Any] | None = None
    for _ in range(read.num_steps):
        if should_stop():
            raise Interrupted
        fields = next(batches)
        under_way = encode_images(fields["images"])
        if before is not None:
            yield from _examples(read, *before)
        before = fields, under_way
    if before is not None:
        yield from _examples(read, *before)


def _examples(read: _ReadExamples, fields: dict[str, Any], moments: Any) -> Iterator[_Encoded]:
    on_host, first_caption = np.asarray(moments), 0
    for place, index in enumerate(read.examples(fields["step"])):
        count = int(fields["counts"][place])
        tokens = np.asarray(fields["tokens"])[first_caption : first_caption + count]
        first_caption += count
        views = on_host[place * read.num_views : (place + 1) * read.num_views]
        bad = fields["bad"].get(index)
        if bad is None and not np.isfinite(views).all():
            raise DataError(
                f"data.cache: the VAE's moments of example {index} are not finite in float16; train"
                " from its pixels, with data.cache=none."
            )
        yield _Encoded(index, views, tokens, bad)


class _MomentsShards:
    """The shards of a cache of moments, from its examples in order."""

    def __init__(self, folder: AnyPath, digest: bytes, layout: Layout, finisher: Finisher):
        self._folder = folder
        self._digest = digest
        self._layout = layout
        self._finisher = finisher
        self._shard: ShardWriter | None = None
        self._bad: dict[int, BadImage] = {}
        self._num_captions = 0

    def add(self, example: _Encoded) -> None:
        """Writes an example; with the last of a shard that is finished."""
        number = example.index // self._layout.shard_examples
        if self._shard is None:
            self._shard, self._bad, self._num_captions = ShardWriter(self._folder, number), {}, 0
        for view, moments in enumerate(example.moments):
            record = MomentsRecord(example.index, view, moments, example.tokens, self._num_captions)
            self._shard.add(record.pack(self._digest))
        self._num_captions += len(example.tokens)
        if example.bad is not None:
            self._bad[example.index] = example.bad
        if example.index == self._layout.examples(number)[-1]:
            self._finisher.finish(self._shard, self._bad)
            self._shard = None

    def discard(self) -> None:
        """Removes a shard that is not finished."""
        if self._shard is not None:
            self._shard.discard()


def write_context(
    moments: CachedMoments,
    tokenizer: Tokenizer,
    *,
    folder: AnyPath,
    digest: bytes,
    pending: Sequence[int],
    bad_images: Sequence[Mapping[int, BadImage]],
    encode_tokens: EncodeTokens,
    num_rows: int,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> None:
    """Writes these shards of the cache of text states of the captions in `moments`; raises
    Interrupted between two batches. `bad_images` are those of each shard, which have no captions.
    """
    layout, done = moments.records.layout, 0
    with finishing() as finisher:
        for number in pending:
            shard = ShardWriter(folder, number)
            try:
                rows = _caption_rows(moments, tokenizer, number)
                for row, states in _states(rows, encode_tokens, num_rows):
                    if should_stop():
                        raise Interrupted
                    shard.add(pack_context(digest, row.index, row.caption, states))
            except BaseException:
                shard.discard()
                raise
            finisher.finish(shard, bad_images[number])
            if number < layout.num_shards:
                done += len(layout.examples(number))
                progress(done)


@dataclass(frozen=True)
class _CaptionRow:
    index: int
    caption: int
    tokens: Int32[np.ndarray, " s"]


def _caption_rows(
    moments: CachedMoments, tokenizer: Tokenizer, shard: int
) -> Iterator[_CaptionRow]:
    """The captions of a shard's examples in order; of the shard past the last the empty one."""
    records = moments.records
    if shard == records.layout.num_shards:
        yield _CaptionRow(EMPTY_CAPTION, 0, tokenizer.encode([""])[0])
        return
    for index in records.layout.examples(shard):
        if index in records.bad_images:
            continue
        for caption, tokens in enumerate(moments.read(index, epoch=0).tokens):
            yield _CaptionRow(index, caption, tokens)


def _states(
    rows: Iterator[_CaptionRow], encode_tokens: EncodeTokens, num_rows: int
) -> Iterator[tuple[_CaptionRow, Float16[np.ndarray, "s d"]]]:
    """Each row with its states; the device is at the next rows while these are written.

    Raises DataError for states that float16 cannot hold.
    """
    before: tuple[list[_CaptionRow], Any] | None = None
    while batch := list(islice(rows, num_rows)):
        tokens = np.zeros((num_rows, *batch[0].tokens.shape), np.int32)
        tokens[: len(batch)] = [row.tokens for row in batch]
        under_way = encode_tokens(tokens)
        if before is not None:
            yield from _finite(*before)
        before = batch, under_way
    if before is not None:
        yield from _finite(*before)


def _finite(
    rows: list[_CaptionRow], on_device: Any
) -> Iterator[tuple[_CaptionRow, Float16[np.ndarray, "s d"]]]:
    for row, states in zip(rows, np.asarray(on_device), strict=False):  # the last rows are padding
        if not np.isfinite(states).all():
            raise DataError(
                f"data.cache: the text states of caption {row.caption} of example {row.index} are"
                " not finite in float16; use data.cache=moments."
            )
        yield row, states
