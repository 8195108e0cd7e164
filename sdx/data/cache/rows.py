"""Training examples out of a cache: the same rows as from pixels, to the rounding of float16.

Which caption, whether it is dropped, and the order of examples are drawn as from pixels. Epoch e
is shown view e mod V of an image, and view v is what epoch v would draw from the pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float16, Int32

from sdx.data.cache.records import (
    EMPTY_CAPTION,
    MAX_SHARDS,
    CacheIndex,
    Layout,
    MomentsRecord,
    read_index,
    records_name,
    unpack_context,
)
from sdx.data.captions import draw_caption
from sdx.data.source import BadImage, DataError, Example, Source
from sdx.data.tokenizer import Tokenizer

Unpacked = TypeVar("Unpacked")

_READER_OPTIONS = "readahead_buffer_size:0"  # its 16 MB a reader are of no use to random access


class Records:
    """The records of one cache on this machine's disk; picklable, safe in threads.

    Raises DataError for a file that is missing or of another size, and for a record whose hash is
    not that of its content.
    """

    def __init__(self, folder: Path, digest: bytes):
        index = read_index(folder)
        if index is None:
            raise DataError(f"{folder}: holds no finished cache; run python -m sdx.encode again.")
        self.index: CacheIndex = index
        self.bad_images = index.bad_images
        self.digest = digest
        self.layout = Layout(index.num_examples)
        self._folder = folder
        self._check_sizes()
        self._readers = lru_cache(MAX_SHARDS)(self._open)

    def read(self, shard: int, place: int, unpack: Callable[[bytes], Unpacked]) -> Unpacked:
        """What `unpack` makes of a record; it raises ValueError for one that is not its own."""
        try:
            [record] = self._readers(shard).read([place])
            return unpack(record)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(shard, error) from error

    def _open(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        return ArrayRecordReader(str(self._folder / records_name(shard)), _READER_OPTIONS)

    def _check_sizes(self) -> None:
        for number, shard in enumerate(self.index.shards):
            file = self._folder / records_name(number)
            size = file.stat().st_size if file.is_file() else None
            if size != shard.num_bytes:
                found = "missing" if size is None else f"of {size} bytes"
                raise self._damaged(number, f"it is {found}, not of {shard.num_bytes} bytes")

    def _damaged(self, shard: int, cause: object) -> DataError:
        return DataError(
            f"{self._folder / records_name(shard)}: damaged ({' '.join(str(cause).split())});"
            " remove it, and python -m sdx.encode with the same overrides makes it anew."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._readers = lru_cache(MAX_SHARDS)(self._open)


@dataclass(frozen=True)
class CachedMoments:
    """Views of examples."""

    records: Records

    def read(self, index: int, epoch: int) -> MomentsRecord:
        """What an example shows in an epoch; it must not be one of the bad."""
        records, num_views = self.records, self.records.index.num_views
        shard, offset = divmod(index, records.layout.shard_examples)
        view = epoch % num_views
        return records.read(
            shard,
            offset * num_views + view,
            partial(MomentsRecord.unpack, digest=records.digest, index=index, view=view),
        )


@dataclass(frozen=True)
class CachedContext:
    """Text states of captions."""

    records: Records

    def read(self, index: int, caption: int, place: int) -> Float16[np.ndarray, "s d"]:
        """Of one caption of an example; `place` is where the example's shard has it."""
        return self._read(index // self.records.layout.shard_examples, place, index, caption)

    def empty(self) -> Float16[np.ndarray, "s d"]:
        """Of the empty caption."""
        return self._read(self.records.layout.num_shards, 0, EMPTY_CAPTION, 0)

    def _read(self, shard: int, place: int, index: int, caption: int) -> Float16[np.ndarray, "s d"]:
        unpack = partial(unpack_context, digest=self.records.digest, index=index, caption=caption)
        return self.records.read(shard, place, unpack)


class CachedSource:
    """A source of which a cache was made; its examples are read from there by the loader.

    `source` may be the first examples of what was encoded.
    """

    def __init__(
        self, source: Source, moments: CachedMoments, context: CachedContext | None = None
    ):
        self.source = source
        self.moments = moments
        self.context = context

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def provenance(self) -> Any:
        """Of the source."""
        return getattr(self.source, "provenance", {})

    @property
    def bad_images(self) -> Sequence[BadImage]:
        """What the source left out, and what could not be read when it was encoded."""
        late = self.moments.records.bad_images
        return [
            *getattr(self.source, "bad_images", ()),
            *(image for index, image in late.items() if index < len(self)),
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return self.source[index]


def cached_rows(
    source: CachedSource, tokenizer: Tokenizer, *, caption_dropout: float, seed: int
) -> "CachedRows":
    """Rows of a cache; `tokenizer` is the one it was made with."""
    return CachedRows(
        source=source,
        empty_tokens=tokenizer.encode([""])[0],
        empty_context=None if source.context is None else source.context.empty(),
        caption_dropout=caption_dropout,
        seed=seed,
    )


@dataclass(frozen=True)
class CachedRows:
    """Moments, tokens and perhaps text states of a cache; the loader's `Rows`."""

    source: CachedSource
    empty_tokens: Int32[np.ndarray, " s"]
    empty_context: Float16[np.ndarray, "s d"] | None
    caption_dropout: float
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def read(
        self, places: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, np.ndarray], dict[int, BadImage]]:
        """As `Rows`; an empty row has moments of 0 and the empty caption."""
        records = self.source.moments.records
        known_bad = records.bad_images
        bad = {index: known_bad[index] for _, index in places if index in known_bad}
        moments = np.zeros((len(places), *records.index.shape), np.float16)
        tokens = np.tile(self.empty_tokens, (len(places), 1))
        context = None
        if self.empty_context is not None:
            context = np.tile(self.empty_context, (len(places), 1, 1))
        for row, (epoch, index) in enumerate(places):
            if index in bad:
                continue
            record = self.source.moments.read(index, epoch)
            moments[row] = record.moments
            caption = draw_caption(
                len(record.tokens),
                dropout=self.caption_dropout,
                seed=self.seed,
                epoch=epoch,
                index=index,
            )
            if caption is None:
                continue
            tokens[row] = record.tokens[caption]
            if context is not None and self.source.context is not None:
                place = record.first_context + caption
                context[row] = self.source.context.read(index, caption, place)
        arrays = {"moments": moments, "tokens": tokens}
        return arrays if context is None else {**arrays, "context": context}, bad
