"""`data=webdataset`: tar shards with an image and its captions side by side.

`KEY.jpg` (or .png, .webp) holds the image; `KEY.json` an object with the caption column, or
`KEY.txt` the caption, where both are the JSON's wins. KEY is a member's path up to the first dot of
its name. Other members are never read: no pickle, no array, nothing is run or extracted, and a
shard is a file here, never a command (`pipe:`) or an address.

A shard is listed once; offset and size of its members are remembered in the user's cache, by the
shard's name, size and modification time. An example is then read by its place in the shard.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sdx.data.captions import caption_texts
from sdx.data.source import BadImageError, DataError
from sdx.data.sources.files import existing_folder, split_files
from sdx.data.sources.imagefolder import IMAGE_SUFFIXES
from sdx.data.sources.remembered import INDEX_CACHE, recall, remember

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_CAPTION_BYTES = 1 << 20
_VERSION = 1  # of what an index holds
_NUM_THREADS = min(8, os.cpu_count() or 1)

Place = tuple[int, int]
"""Offset and size in bytes."""


@dataclass(frozen=True)
class _Sample:
    """Where the parts of one sample lie in its shard, by `image`, `json` and `txt`; `fault` says
    what makes it none.
    """

    key: str
    parts: dict[str, Place]
    fault: str = ""


class WebDatasetRecords:
    """The samples of tar shards, in the order of the shards' paths; see `checked.Records`."""

    def __init__(
        self,
        dir: str | Path,
        *,
        files: str | None,
        split: str,
        caption_column: str,
        say: Callable[[str], None] = print,
        index_cache: Path | None = INDEX_CACHE,
    ):
        self._root = existing_folder(Path(dir))
        self._shards = split_files(self._root, files, (".tar", *_COMPRESSED), split)
        self._caption_column = caption_column
        self._stamps = [_shard_stamp(shard) for shard in self._shards]
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sdx-index") as threads:
            indexes = threads.map(lambda shard: _index(shard, index_cache, say), self._shards)
            self._samples = [
                (number, sample) for number, index in enumerate(indexes) for sample in index
            ]
        self.place = str(self._root)
        self.key = f"webdataset {self._root} {files} {split}"
        self.provenance: dict[str, Any] = {}
        if not self._samples:
            raise DataError(
                f"data.dir={dir}: no image in the {len(self._shards)} tar files there; a sample is"
                " KEY.jpg, .png or .webp with KEY.txt or KEY.json beside it."
            )

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        number, sample = self._samples[index]
        return f"{self._shards[number].relative_to(self._root).as_posix()}/{sample.key}"

    def stamp(self, index: int) -> tuple[int, ...]:
        """Of the shard, and the image's place in it."""
        number, sample = self._samples[index]
        return *self._stamps[number], *_part(sample, "image")

    def image(self, index: int) -> bytes:
        number, sample = self._samples[index]
        return self._read(number, _part(sample, "image"))

    def captions(self, index: int) -> tuple[str, ...]:
        number, sample = self._samples[index]
        if sample.fault:
            raise BadImageError("duplicate key", sample.fault)
        found: tuple[str, ...] | None = None
        if "json" in sample.parts:
            found = self._from_json(self._text(number, sample, "json"))
        if found is None and "txt" in sample.parts:
            caption = self._text(number, sample, "txt").strip()
            found = (caption,) if caption else ()
        if found is None:
            raise BadImageError("no caption", f"no .txt, and no .json with {self._caption_column}")
        if not found:
            raise BadImageError("no caption", "it is blank")
        return found

    def _from_json(self, text: str) -> tuple[str, ...] | None:
        """The captions of a sample's JSON; None where it has no such column."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadImageError("caption unreadable", f".json: {error}") from error
        if not isinstance(content, dict):
            raise BadImageError("caption unreadable", f".json: a {type(content).__name__}")
        if self._caption_column not in content:
            return None
        try:
            return caption_texts(content[self._caption_column], self._caption_column)
        except ValueError as error:
            raise BadImageError("no caption", str(error)) from error

    def _text(self, number: int, sample: _Sample, part: str) -> str:
        offset, size = sample.parts[part]
        if size > _MAX_CAPTION_BYTES:
            raise BadImageError("caption unreadable", f".{part}: {size} bytes")
        try:
            return self._read(number, (offset, size)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadImageError("caption not UTF-8", f".{part}: {error.reason}") from error

    def _read(self, number: int, place: Place) -> bytes:
        offset, size = place
        try:
            with open(self._shards[number], "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise BadImageError(reason, str(error.strerror)) from error


def _part(sample: _Sample, part: str) -> Place:
    if part not in sample.parts:
        raise BadImageError("missing", f"{sample.key} has captions and no {part}")
    return sample.parts[part]


def _shard_stamp(shard: Path) -> tuple[int, int]:
    stat = shard.stat()
    return stat.st_size, stat.st_mtime_ns


def _index(shard: Path, cache: Path | None, say: Callable[[str], None]) -> list[_Sample]:
    """The samples of a shard, from the cache or from the shard."""
    key = json.dumps([_VERSION, str(shard), *_shard_stamp(shard)])
    known = _read_index(recall(cache, key))
    if known is not None:
        return known
    samples = _samples(_members(shard))
    remember(cache, key, [[s.key, s.parts, s.fault] for s in samples], say)
    return samples


def _members(shard: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of each file in the shard; DataError where it is no whole, plain tar."""
    with shard.open("rb") as file:
        _refuse_compressed(shard, file.read(8))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        yield member.name, (member.offset_data, member.size)
                end = tar.offset
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(
                f"{shard}: cannot be read as a tar file ({error}); get it again."
            ) from error
        _check_end(shard, file, end)


def _refuse_compressed(shard: Path, head: bytes) -> None:
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"{shard}: is compressed with {name}, so that no example can be read by its place;"
                " unpack it once to a plain .tar (gunzip, bunzip2, unxz or unzstd); images in it"
                " are compressed already."
            )


def _check_end(shard: Path, file: BinaryIO, end: int) -> None:
    """DataError where the list ended for another reason than a tar's end mark, 512 zero bytes.

    tarfile takes whatever it does not know for the end, except at the very beginning.
    """
    file.seek(end)
    if (mark := file.read(tarfile.BLOCKSIZE)) == bytes(tarfile.BLOCKSIZE):
        return
    what = "is cut off" if len(mark) < tarfile.BLOCKSIZE else "is damaged"
    raise DataError(f"{shard}: {what} at byte {end}: no member and no end mark; get it again.")


def _samples(members: Iterator[tuple[str, Place]]) -> list[_Sample]:
    """Members grouped by key, in the order of the keys' first members."""
    parts: dict[str, dict[str, Place]] = {}
    faults: dict[str, str] = {}
    for name, place in members:
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        part = "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix.lower()
        if file.startswith(".") or part not in ("image", "json", "txt"):
            continue
        key = f"{folder}{slash}{stem}"
        there = parts.setdefault(key, {})
        if part in there:
            faults[key] = f"{key} has more than one {part}"
        there[part] = place
    return [_Sample(key, there, faults.get(key, "")) for key, there in parts.items()]


def _read_index(rows: Any) -> list[_Sample] | None:
    """The samples of a list that this file wrote; None for anything else."""
    try:
        return [
            _Sample(key, {part: (int(o), int(s)) for part, (o, s) in parts.items()}, fault)
            for key, parts, fault in rows
        ]
    except (ValueError, TypeError, AttributeError):
        return None  # then the shard is listed
