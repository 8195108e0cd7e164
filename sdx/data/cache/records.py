"""What a cache of encoded examples is: its name, its files and its records. rows.py reads it,
shards.py writes it.

A cache is a folder named by a hash of everything its content follows from (`CacheKey`); another
model, size or list of examples is another folder. Examples lie in their order in ArrayRecord files
of `shard_examples` each (`Layout`), so where one lies is arithmetic. There are two kinds:

- `moments`: for each example its views one after the other, each with the VAE's mean and
  log-variance in float16 and the token ids of all its captions;
- `context`: the text encoder's states in float16 for each caption of each example, and in one more
  file those of the empty caption. It belongs to one cache of moments, which says how many captions
  an example has.

Every record says which cache and example it is of, and ArrayRecord (Riegeli) keeps a hash of each
record and compares it when that is read: of 30 files with one flipped bit, 30 were found.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float16, Int32

from sdx.data.source import BadImage, DataError
from sdx.record.files import DamagedRecord, read_json
from sdx.record.store import AnyPath

FORMAT = 1
"""Raised when the same inputs would give another content, or lie elsewhere."""
MOMENTS, CONTEXT = "moments", "context"
MAX_SHARDS = 1024  # files that a reader keeps open, and that a folder lists
MAX_SHARD_EXAMPLES = 512  # as long as that gives no more than MAX_SHARDS: 34 MB at 512 pixels
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
_ENCODE = "run python -m sdx.encode with the same overrides"
_MIN_SHARDS = 16  # so that few examples too are work for several processes

Part = str | int | bool | None


@dataclass(frozen=True)
class CacheKey:
    """Everything that decides what a cache holds, in words."""

    kind: str
    """`moments` or `context`."""
    parts: Mapping[str, Part]

    @property
    def digest(self) -> bytes:
        """Eight bytes that every record carries."""
        text = json.dumps({"format": FORMAT, "kind": self.kind, **self.parts}, sort_keys=True)
        return hashlib.sha256(text.encode()).digest()[:8]

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.kind}-{self.digest.hex()}"

    def differences(self, parts: Mapping[str, Part]) -> list[str]:
        """`resolution 512 ≠ 768` for each part that another cache has otherwise; null is none."""
        pairs = {name: (parts.get(name), self.parts.get(name)) for name in {**self.parts, **parts}}
        return [
            f"{name} {_said(there)} ≠ {_said(here)}"
            for name, (there, here) in pairs.items()
            if there != here
        ]


@dataclass(frozen=True)
class Layout:
    """Which example lies in which shard; follows from their number alone."""

    num_examples: int

    @property
    def shard_examples(self) -> int:
        """Examples in each shard but the last, which may have fewer."""
        few = min(-(-self.num_examples // _MIN_SHARDS), MAX_SHARD_EXAMPLES)
        return max(1, few, -(-self.num_examples // MAX_SHARDS))

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.shard_examples)

    def examples(self, shard: int) -> range:
        """The examples of a shard."""
        first = shard * self.shard_examples
        return range(first, min(first + self.shard_examples, self.num_examples))


@dataclass(frozen=True)
class Shard:
    """A finished file of records, and the examples in it that could not be read."""

    records: int
    num_bytes: int
    sha256: str
    bad_images: Mapping[int, BadImage]

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        bad = [{"index": index, **asdict(image)} for index, image in self.bad_images.items()]
        return {**asdict(self), "bad_images": bad}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Shard":
        """The shard that `to_json` described."""
        bad = {
            row["index"]: BadImage(row["path"], row["reason"], row["detail"])
            for row in fields["bad_images"]
        }
        return Shard(fields["records"], fields["num_bytes"], fields["sha256"], bad)


@dataclass(frozen=True)
class CacheIndex:
    """A whole cache; there is one only when every shard is there."""

    num_examples: int
    num_views: int
    shape: tuple[int, ...]
    """Of one view's moments, or one caption's states."""
    shards: tuple[Shard, ...]

    @property
    def bad_images(self) -> dict[int, BadImage]:
        """The examples that could not be read, by index."""
        return {index: image for shard in self.shards for index, image in shard.bad_images.items()}

    def to_json(self) -> dict[str, Any]:
        """As `read_index` reads it."""
        return {**asdict(self), "shards": [shard.to_json() for shard in self.shards]}


def read_index(folder: AnyPath) -> CacheIndex | None:
    """The index of the cache in `folder`; None where it is not finished. DamagedRecord where it is
    none that sdx wrote; `sdx.encode` writes it anew."""
    file = folder / "index.json"
    fields = read_json(file)
    if fields is None:
        return None
    try:
        shards = tuple(Shard.from_json(shard) for shard in fields["shards"])
        shape = tuple(fields["shape"])
        return CacheIndex(fields["num_examples"], fields["num_views"], shape, shards)
    except (KeyError, TypeError) as error:
        raise DamagedRecord(f"{file}: no index of a cache ({error}); {_ENCODE}.") from error


def read_shard(folder: AnyPath, number: int) -> Shard | None:
    """What is known of a finished shard; None where it is not, or is not told."""
    try:
        fields = read_json(folder / f"{number:05d}.json")
        return None if fields is None else Shard.from_json(fields)
    except (DamagedRecord, KeyError, TypeError):
        return None


def records_name(number: int) -> str:
    """The file of a shard's records."""
    return f"{number:05d}.arrayrecord"


def size_text(num_bytes: int) -> str:
    """`66.2 KB`, `13.4 GB`."""
    unit, name = next(unit for unit in _UNITS if num_bytes >= unit[0] or unit is _UNITS[-1])
    return f"{num_bytes / unit:.3g} {name}"


def find_cache(cache_dir: AnyPath, key: CacheKey) -> AnyPath:
    """The folder of the finished cache of that key; DataError where there is none, with what is
    there instead."""
    folder = cache_dir / key.name
    if (folder / "index.json").is_file():
        return folder
    command = _ENCODE
    if (folder / "meta.json").is_file():
        raise DataError(f"data.cache: {folder} is not finished; {command} to go on with it.")
    others = [(key.differences(parts), name) for name, parts in _caches(cache_dir, key.kind)]
    if not others:
        raise DataError(f"data.cache: {cache_dir} holds no cache of {key.kind}; {command}.")
    faults, name = min(others, key=lambda other: len(other[0]))
    raise DataError(
        f"data.cache: {cache_dir} holds no cache of this; the nearest, {name}, differs in"
        f" {', '.join(faults)}; {command}."
    )


def _caches(cache_dir: AnyPath, kind: str) -> Iterator[tuple[str, Mapping[str, Part]]]:
    """Name and parts of every cache of this kind."""
    if not cache_dir.is_dir():
        return
    for folder in sorted(cache_dir.glob(f"{kind}-*")):
        meta = read_json(folder / "meta.json")
        if meta is not None and meta.get("format") == FORMAT:
            yield folder.name, meta["key"]


def _said(part: Part) -> str:
    return json.dumps(part) if part is None or isinstance(part, bool) else str(part)


_MOMENTS_HEADER = struct.Struct("<8sQIHHHHHH")
_CONTEXT_HEADER = struct.Struct("<8sQHHH")
EMPTY_CAPTION = 2**64 - 1
"""Index under which the empty caption's states are kept."""


@dataclass(frozen=True)
class MomentsRecord:
    """One view of an example."""

    index: int
    view: int
    moments: Float16[np.ndarray, "h w m"]
    tokens: Int32[np.ndarray, "n s"]
    """Of all its captions."""
    first_context: int
    """Place of its first caption's record in the shard of the same number of a cache of context."""

    def pack(self, digest: bytes) -> bytes:
        """The bytes of the record in the cache of that digest."""
        header = _MOMENTS_HEADER.pack(
            digest,
            self.index,
            self.first_context,
            self.view,
            *self.moments.shape,
            *self.tokens.shape,
        )
        return header + self.moments.tobytes() + self.tokens.tobytes()

    @staticmethod
    def unpack(record: bytes, *, digest: bytes, index: int, view: int) -> "MomentsRecord":
        """The view in `record`, its arrays within those bytes; ValueError if it is another's."""
        found, found_index, first_context, found_view, *shape = _MOMENTS_HEADER.unpack_from(record)
        if (found, found_index, found_view) != (digest, index, view):
            raise ValueError(f"holds view {found_view} of example {found_index}")
        height, width, channels, num_captions, length = shape
        moments = np.frombuffer(
            record, np.float16, height * width * channels, _MOMENTS_HEADER.size
        ).reshape(height, width, channels)
        tokens = np.frombuffer(
            record, np.int32, num_captions * length, _MOMENTS_HEADER.size + moments.nbytes
        ).reshape(num_captions, length)
        return MomentsRecord(index, view, moments, tokens, first_context)


def pack_context(
    digest: bytes, index: int, caption: int, states: Float16[np.ndarray, "s d"]
) -> bytes:
    """The record of one caption's text states."""
    return _CONTEXT_HEADER.pack(digest, index, caption, *states.shape) + states.tobytes()


def unpack_context(
    record: bytes, *, digest: bytes, index: int, caption: int
) -> Float16[np.ndarray, "s d"]:
    """The states in `record`, within those bytes; ValueError if it is another's."""
    found, found_index, found_caption, length, width = _CONTEXT_HEADER.unpack_from(record)
    if (found, found_index, found_caption) != (digest, index, caption):
        raise ValueError(f"holds caption {found_caption} of example {found_index}")
    states = np.frombuffer(record, np.float16, length * width, _CONTEXT_HEADER.size)
    return states.reshape(length, width)
