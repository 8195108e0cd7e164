"""What a source of training examples is, and how one says that its data is bad.

A source is a fixed list: its length and order never change while a run lives, so the order of
training can be a function of (seed, epoch, position) alone. Shuffling, cropping, choosing captions
and batching are the loader's business.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image


@dataclass(frozen=True)
class Example:
    """One image as a viewer shows it, at its own size, and at least one caption.

    A source hands over RGB pixels, or an image of Pillow in mode RGB as `decode` returns it, which
    spares two copies.
    """

    image: UInt8[np.ndarray, "H W 3"] | Image.Image
    captions: tuple[str, ...]

    @property
    def pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image as an array: RGB, 0 to 255."""
        return np.asarray(self.image)

    @property
    def picture(self) -> Image.Image:
        """The image as one of Pillow."""
        return self.image if isinstance(self.image, Image.Image) else Image.fromarray(self.image)


@runtime_checkable
class Source(Protocol):
    """Examples by index. `fingerprint` names the content: it is equal exactly where the examples
    are.

    `__getitem__` raises `BadImageError` for an example that can no longer be read; the loader gives
    it weight 0. A source may also have `sizes`, its images' heights and widths in pixels;
    `digests`, numbers that are equal for equal images; `bad_images`, what it left out; and
    `provenance`, what a run notes of where it came from.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class BadImage:
    """An image that is left out: its path as the source names it, a short reason, and what was
    seen.
    """

    path: str
    reason: str
    detail: str = ""


class BadImageError(ValueError):
    """One image cannot be used; `reason` is short and countable, `detail` says what was seen."""

    def __init__(self, reason: str, detail: str = "", path: str = ""):
        super().__init__(reason, detail, path)
        self.reason = reason
        self.detail = detail
        self.path = path


class DataError(ValueError):
    """The data cannot be trained on as it is; raised before any device is touched, except for
    late-bad images.
    """

    def __init__(self, message: str, bad_images: Sequence[BadImage] = ()):
        super().__init__(message)
        self.bad_images = tuple(bad_images)


class Part:
    """The examples of a source whose indices are in `rows`."""

    def __init__(self, source: Source, rows: range):
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < len(self._rows):
            raise IndexError(index)
        return self._source[self._rows[index]]

    @property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}[{self._rows.start}:{self._rows.stop}]"

    @property
    def sizes(self) -> Int32[np.ndarray, "n 2"]:
        """Heights and widths, where the whole source knows them."""
        return cast(Any, self._source).sizes[self._rows.start : self._rows.stop]

    @property
    def bad_images(self) -> Sequence[BadImage]:
        """What the whole source left out."""
        return getattr(self._source, "bad_images", ())

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the whole source came from."""
        return getattr(self._source, "provenance", {})


def first_examples(source: Source, num_examples: int) -> Source:
    """The source, or its first examples where it has more."""
    return source if num_examples >= len(source) else Part(source, range(num_examples))


def count_reasons(bad_images: Sequence[BadImage]) -> str:
    """`truncated × 3, empty × 1`: the reasons, most frequent first."""
    counts = Counter(bad.reason for bad in bad_images)
    return ", ".join(f"{reason} × {count}" for reason, count in counts.most_common())
