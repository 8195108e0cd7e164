"""The good images of any stored data: each one is read once before training, and judged.

Every kind of stored data (folders, tables, tar shards, ArrayRecord files) says what its records
are (`Records`); which of them can be trained on is decided here, alike for all. What is wrong with
one record leaves that record out and counts it (`bad_images`); too many of them stop the run.

Every image is decoded once to find the bad ones, since neither its header nor its end shows a
damaged middle. What was found good is remembered in the user's cache, by what the records say
their bytes depend on (such as size and modification time), so that the next start reads none.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt64

from sdx.config.splits import Split
from sdx.data.images import check_size, decode
from sdx.data.source import BadImage, BadImageError, DataError, Example, count_reasons
from sdx.data.sources.remembered import SCAN_CACHE, recall, remember

_MAX_BAD_SHOWN = 10
_NUM_THREADS = min(16, os.cpu_count() or 1)
_BATCH = 256  # records judged by one call of a thread


@runtime_checkable
class Records(Protocol):
    """What is stored, before anything of it is judged; picklable, and read by many threads.

    `name`, `captions`, `image` and `stamp` raise `BadImageError` for a record that is no example.
    """

    @property
    def place(self) -> str:
        """Where the data lies, as messages call it."""
        ...

    @property
    def key(self) -> str:
        """Another text for other data: what was found out is remembered under it."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What a run notes of where its data came from; may be empty."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What messages call the record; no two have the same."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """At least one, none of them blank."""
        ...

    def stamp(self, index: int) -> tuple[int, ...]:
        """Numbers that change when the image's bytes do; found without reading those."""
        ...

    def image(self, index: int) -> bytes:
        """The image file's content."""
        ...


@dataclass(frozen=True)
class _Good:
    """A record that can be trained on; `digest` is that of its image file."""

    index: int
    captions: tuple[str, ...]
    height: int
    width: int
    digest: str


class CheckedSource:
    """The good ones among the records of a split, in their order; a `Source`.

    `sizes` are the images' heights and widths as shown, `digests` tell their files apart,
    `bad_images` is what was left out. The fingerprint is of the images' bytes and the captions
    alone: the same examples have the same one wherever and however they are stored. `say` is handed
    lines for the user. Raises `DataError` where no image is usable, or more than `max_bad_fraction`
    are not.
    """

    def __init__(
        self,
        records: Records,
        split: Split,
        *,
        max_bad_fraction: float,
        max_pixels: int,
        say: Callable[[str], None],
        scan_cache: Path | None = SCAN_CACHE,
    ):
        self._records = records
        self._max_pixels = max_pixels
        rows = split.rows(len(records))
        verdicts = _Scan(records, max_pixels, scan_cache).judge(rows, say)
        good = [verdict for verdict in verdicts if isinstance(verdict, _Good)]
        self.bad_images = [verdict for verdict in verdicts if isinstance(verdict, BadImage)]
        _refuse_or_say(records.place, len(good), self.bad_images, max_bad_fraction, say)
        self._indices = np.array([found.index for found in good], np.int64)
        self._captions = [found.captions for found in good]
        self.sizes: Int32[np.ndarray, "n 2"] = np.array(
            [(found.height, found.width) for found in good], np.int32
        )
        self.digests: UInt64[np.ndarray, " n"] = np.array(
            [int(found.digest[:16], 16) for found in good], np.uint64
        )
        self.fingerprint = _fingerprint(good)
        self.provenance = dict(records.provenance)

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int, /) -> Example:
        captions = self._captions[index]
        record = int(self._indices[index])
        try:
            image = decode(self._records.image(record), max_pixels=self._max_pixels)
        except BadImageError as error:
            name = self._records.name(record)
            raise BadImageError(error.reason, error.detail, name) from error
        return Example(image, captions)


def _fingerprint(good: list[_Good]) -> str:
    digest = hashlib.sha256()
    for found in good:
        digest.update(json.dumps([found.digest, found.captions]).encode())
    return digest.hexdigest()[:16]


def _refuse_or_say(
    place: str,
    num_good: int,
    bad_images: list[BadImage],
    max_bad_fraction: float,
    say: Callable[[str], None],
) -> None:
    num_bad = len(bad_images)
    if not num_bad:
        return
    reasons = count_reasons(bad_images)
    total = num_bad + num_good
    if num_good and num_bad / total <= max_bad_fraction:
        say(f"skipped {num_bad} bad images: {reasons}")
        return
    fix = "repair or replace them"
    if num_good:
        fix += f", or raise the limit to {_ceil(num_bad / total)} and go on without them"
    shown = [
        f"  {bad.path}: {bad.reason}" + (f" ({bad.detail})" if bad.detail else "")
        for bad in bad_images[:_MAX_BAD_SHOWN]
    ]
    if num_bad > len(shown):
        shown.append(f"  and {num_bad - len(shown)} more")
    raise DataError(
        f"data.max_bad_fraction={max_bad_fraction}: {num_bad} of {total} images of {place} are bad"
        f" ({reasons}); {fix}.\n" + "\n".join(shown),
        bad_images,
    )


def _ceil(fraction: float) -> float:
    """The fraction rounded up to three digits after the point, for a limit that lets it pass."""
    return math.ceil(fraction * 1000) / 1000


@dataclass(frozen=True)
class _Remembered:
    """What is known of a good image: the stamp it had, its height, width and digest."""

    stamp: tuple[int, ...]
    height: int
    width: int
    digest: str


class _Scan:
    """Judges records, in threads, and remembers the good ones between runs."""

    def __init__(self, records: Records, max_pixels: int, cache: Path | None):
        self._records = records
        self._max_pixels = max_pixels
        self._cache = cache
        self._known = _read(recall(cache, records.key))

    def judge(self, rows: range, say: Callable[[str], None]) -> list[_Good | BadImage]:
        """An entry for each good record, in order, and a `BadImage` for each bad one."""
        if len(self._known) < len(rows) // 2:
            say(f"checking {len(rows)} images of {self._records.place}")
        parts = [rows[first : first + _BATCH] for first in range(0, len(rows), _BATCH)]
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sdx-scan") as threads:
            judged = [pair for part in threads.map(self._judge, parts) for pair in part]
        found = {name: memory for name, memory, _ in judged if memory is not None}
        bad = {name for name, memory, _ in judged if memory is None}
        others = {} if len(rows) == len(self._records) else self._known  # those of other slices
        good = {name: memory for name, memory in others.items() if name not in bad} | found
        if good != self._known:
            kept = {name: [m.stamp, m.height, m.width, m.digest] for name, m in good.items()}
            remember(self._cache, self._records.key, kept, say)
        return [verdict for _, _, verdict in judged]

    def _judge(self, rows: range) -> list[tuple[str, _Remembered | None, _Good | BadImage]]:
        return [self._verdict(index) for index in rows]

    def _verdict(self, index: int) -> tuple[str, _Remembered | None, _Good | BadImage]:
        name = self._records.name(index)
        try:
            name.encode()
            captions = self._records.captions(index)
            found = self._check(index, name)
        except UnicodeEncodeError:
            readable = name.encode(errors="backslashreplace").decode()
            return readable, None, BadImage(readable, "name not UTF-8")
        except BadImageError as error:
            return name, None, BadImage(name, error.reason, error.detail)
        return name, found, _Good(index, captions, found.height, found.width, found.digest)

    def _check(self, index: int, name: str) -> _Remembered:
        stamp = self._records.stamp(index)
        known = self._known.get(name)
        if known is not None and known.stamp == stamp:
            check_size(known.width, known.height, self._max_pixels)
            return known
        content = self._records.image(index)
        width, height = decode(content, max_pixels=self._max_pixels).size
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return _Remembered(stamp, height, width, digest)


def _read(content: Any) -> dict[str, _Remembered]:
    """What is remembered, by name; empty where it is nothing that this file wrote."""
    try:
        return {
            str(name): _Remembered(tuple(map(int, stamp)), int(height), int(width), str(digest))
            for name, (stamp, height, width, digest) in content.items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}  # then everything is checked again
