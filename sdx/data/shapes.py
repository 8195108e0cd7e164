"""The procedural data set: one coloured shape on a coloured background, and its caption.

Owns the attributes, their captions and their drawing; `adherence.py` judges such pictures from
pixels alone. Example i depends on nothing but i, so the set is unlimited, and a fifth of the
(shape, colour, background) triples is kept out of training, in every size, so that pictures of
them show what was composed rather than remembered.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Float, UInt8

from sdx.data.source import DataError, Example

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 130, 20),
    "yellow": (250, 220, 50),
    "green": (35, 160, 75),
    "cyan": (60, 205, 225),
    "blue": (40, 80, 215),
    "purple": (140, 50, 165),
    "pink": (245, 145, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "blue": COLOURS["blue"],
    "green": COLOURS["green"],
    "yellow": COLOURS["yellow"],
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES: dict[str, tuple[float, float]] = {"small": (0.255, 0.265), "large": (0.315, 0.325)}
"""Range of the radius of each size, as a share of the image's side."""
GRID = 16
"""Centres lie on a grid of this many cells a side; a finer one takes longer to learn."""
REACH = 1
"""Cells of the grid that a centre may lie off the middle, across and down."""

HELD_OUT_EVERY = 5
VERSION = 1
"""Raised whenever the same index would draw another picture."""


@dataclass(frozen=True)
class Attributes:
    """What a caption says about a picture; the place of the shape is free."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @property
    def is_held_out(self) -> bool:
        """True for the triples that `train` never shows; every single value stays common there."""
        triple = (
            SHAPES.index(self.shape)
            + list(COLOURS).index(self.colour)
            + list(BACKGROUNDS).index(self.background)
        )
        return triple % HELD_OUT_EVERY == 0


def parse_caption(caption: str) -> Attributes | None:
    """The attributes behind `caption`, or None if `Attributes.caption` never writes that text."""
    match = re.fullmatch(r"a (\w+) (\w+) (\w+) on a (\w+) background", caption)
    if match is None:
        return None
    attributes = Attributes(*match.groups())
    return attributes if attributes in combinations("train") + combinations("validation") else None


@cache
def combinations(split: str) -> tuple[Attributes, ...]:
    """Every combination of attributes that `split` (train or validation) shows, in one order."""
    if split not in ("train", "validation"):
        raise DataError(f"data.split={split}: data=shapes has train and validation.")
    return tuple(c for c in _all_combinations() if c.is_held_out == (split == "validation"))


def held_out_prompts(num_prompts: int) -> list[str]:
    """`num_prompts` captions of combinations not seen in training, spread evenly over them."""
    captions = [attributes.caption for attributes in combinations("validation")]
    order = np.random.default_rng(0).permutation(len(captions))
    return [captions[order[i % len(captions)]] for i in range(num_prompts)]


class ShapesSource:
    """`num_examples` drawn pictures of side `resolution`; a `Source`."""

    def __init__(self, num_examples: int, resolution: int, split: str = "train"):
        self._num_examples = num_examples
        self._resolution = resolution
        self._split = split
        self._combinations = combinations(split)

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> Example:
        """Example `index`: its attributes, size and place come from (split, index) alone."""
        if not 0 <= index < self._num_examples:
            raise IndexError(f"example {index} of {self._num_examples}")
        rng = np.random.default_rng((index, len(self._combinations)))
        attributes = self._combinations[rng.integers(len(self._combinations))]
        radius = rng.uniform(*SIZES[attributes.size])
        center = 0.5 + rng.integers(-REACH, REACH, 2, endpoint=True) / GRID
        image = draw(attributes, radius, (center[0], center[1]), self._resolution)
        return Example(image=image, captions=(attributes.caption,))

    @property
    def fingerprint(self) -> str:
        """Changes whenever any example would."""
        text = f"shapes {VERSION} {self._split} {self._num_examples} {self._resolution}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(
    attributes: Attributes, radius: float, center: tuple[float, float], resolution: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of `attributes`; `radius` and `center` (x, y) are shares of the side."""
    colour = np.array(COLOURS[attributes.colour], np.float32)
    background = np.array(BACKGROUNDS[attributes.background], np.float32)
    coverage = cover(attributes.shape, radius, center, resolution)[..., None]
    return (background + (colour - background) * coverage + 0.5).astype(np.uint8)


def cover(
    shape: str, radius: float, center: tuple[float, float], resolution: int
) -> Float[np.ndarray, "H W"]:
    """How much of each pixel the shape covers, 0 to 1, from its distance to the outline."""
    place = np.arange(0.5, resolution, dtype=np.float32)
    x = place[None, :] - np.float32(center[0] * resolution)
    y = place[:, None] - np.float32(center[1] * resolution)
    distance = _DISTANCES[shape](x, y, np.float32(radius * resolution))
    return np.clip(0.5 - distance, 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    return np.sqrt(x * x + y * y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.95) * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    """Upright and equilateral, its circumcentre a little below the given centre."""
    y = y - np.float32(0.25) * radius
    inner = np.float32(0.625) * radius  # half the circumradius 1.25
    slanted = np.float32(3**0.5 / 2) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(slanted, y) - inner


def _star(x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    """Five points, one up: fold the plane into one tenth, where the outline is one line."""
    fifth = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    folded = np.abs(angle - fifth * np.round(angle / fifth))
    length = np.sqrt(x * x + y * y)
    tip = np.array([1.3 * radius, 0.0])
    notch = 0.56 * radius * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    along = (notch - tip) / np.linalg.norm(notch - tip)
    outward = np.array([along[1], -along[0]]).astype(np.float32)
    offset = np.float32(outward @ tip)
    return length * np.cos(folded) * outward[0] + length * np.sin(folded) * outward[1] - offset


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}


def _all_combinations() -> Iterator[Attributes]:
    for size, colour, shape, background in product(SIZES, COLOURS, SHAPES, BACKGROUNDS):
        if colour != background:
            yield Attributes(size, colour, shape, background)
