"""What a source of training examples is, and how one says that its data is bad.

A source is a fixed list: its length and order never change while a run lives, so the order of
training can be a function of (seed, epoch, position) alone. Shuffling, cropping, choosing captions
and batching are the loader's business.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
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
    it weight 0.
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


class FirstExamples:
    """The first examples of a source, which has at least one."""

    def __init__(self, source: Source, num_examples: int):
        self._source = source
        self._length = min(num_examples, len(source))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._source[index]

    @property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}[:{self._length}]"

    @property
    def bad_images(self) -> Sequence[BadImage]:
        """What the whole source left out."""
        return getattr(self._source, "bad_images", ())


def count_reasons(bad_images: Sequence[BadImage]) -> str:
    """`truncated × 3, empty × 1`: the reasons, most frequent first."""
    counts = Counter(bad.reason for bad in bad_images)
    return ", ".join(f"{reason} × {count}" for reason, count in counts.most_common())
