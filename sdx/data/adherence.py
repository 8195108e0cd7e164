"""The judge of `data=shapes`: what a picture shows, from its pixels alone.

The border gives the background, the pixels farthest from it the shape's colour; how far each pixel
lies on the way from one to the other is the shape's coverage, and the outline that overlaps it
best, over all shapes, radii and places, is the shape. No prompt, network or training enters the
judgement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8

from sdx.data.shapes import BACKGROUNDS, COLOURS, SHAPES, cover, parse_caption

MIN_CONTRAST = 40.0
"""RGB distance from the background below which nothing is a shape; the palette's least is 108."""
MIN_OVERLAP = 0.75
"""Dice overlap with the best outline below which the thing drawn is none of the shapes."""
RADII = np.geomspace(0.12, 0.48, 21)

PALETTE = {**COLOURS, **BACKGROUNDS}


@dataclass(frozen=True)
class Judgement:
    """What a picture shows; None where nothing known is seen."""

    colour: str | None
    shape: str | None
    background: str


@dataclass(frozen=True)
class Adherence:
    """Share of pictures whose shape has the prompt's colour, and the prompt's form, 0 to 1."""

    colour: float
    shape: float

    def __str__(self) -> str:
        return f"colour={self.colour:.2f} shape={self.shape:.2f}"


def measure_adherence(images: UInt8[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> Adherence:
    """How often `images` show what `prompts` (captions of `data=shapes`) ask for."""
    asked = [parse_caption(prompt) for prompt in prompts]
    seen = [judge(image) for image in images]
    if len(asked) != len(seen):
        raise ValueError(f"{len(seen)} images for {len(asked)} prompts: give one image per prompt.")
    pairs = [(a, s) for a, s in zip(asked, seen, strict=True) if a is not None]
    if not pairs:
        raise ValueError("no prompt is a caption of data=shapes, so nothing can be judged.")
    return Adherence(
        colour=sum(a.colour == s.colour for a, s in pairs) / len(pairs),
        shape=sum(a.shape == s.shape for a, s in pairs) / len(pairs),
    )


def judge(image: UInt8[np.ndarray, "H W 3"]) -> Judgement:
    """Colour and form of the one shape in a square picture, and the background's colour."""
    pixels = image.astype(np.float32)
    background = np.median(_border(pixels), axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    core = distance >= 0.8 * np.quantile(distance, 0.99)
    way = np.median(pixels[core], axis=0) - background
    if np.linalg.norm(way) < MIN_CONTRAST:
        return Judgement(None, None, _nearest(background, BACKGROUNDS))
    coverage = np.clip((pixels - background) @ way / (way @ way), 0, 1)
    shape, inside, overlap = _best_outline(coverage)
    return Judgement(
        colour=_nearest(np.median(pixels[inside], axis=0), PALETTE),
        shape=shape if overlap >= MIN_OVERLAP else None,
        background=_nearest(background, BACKGROUNDS),
    )


def _border(pixels: np.ndarray) -> np.ndarray:
    """The outermost pixels, (n, 3): every shape keeps clear of them."""
    sides = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return np.concatenate(sides)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]))))


def _best_outline(coverage: Float[np.ndarray, "H W"]) -> tuple[str, np.ndarray, float]:
    """The shape whose outline overlaps `coverage` best, its inner half as a mask, and the overlap.

    Dice = 2 <coverage, outline> / (|coverage|^2 + |outline|^2), at every place at once by Fourier
    transform.
    """
    names, radii, spectra, energies = _outlines(coverage.shape[0])
    products = np.fft.irfft2(np.fft.rfft2(coverage) * spectra, s=coverage.shape)
    dice = 2 * products / (np.sum(coverage**2) + energies[:, None, None])
    which, row, column = np.unravel_index(np.argmax(dice), dice.shape)
    # The outlines are drawn about the middle; the best shift moves that, wrapping around.
    side = coverage.shape[0]
    center = (((column / side + 0.5) % 1), ((row / side + 0.5) % 1))
    inside = cover("circle", 0.5 * radii[which], center, side) >= 0.5
    return names[which], inside, float(dice[which, row, column])


@cache
def _outlines(side: int) -> tuple[list[str], list[float], np.ndarray, np.ndarray]:
    """Shape, radius, conjugate spectrum and energy of every outline tried on pictures of `side`."""
    candidates = [(shape, float(radius)) for shape in SHAPES for radius in RADII]
    outlines = np.stack([cover(shape, radius, (0.5, 0.5), side) for shape, radius in candidates])
    spectra = np.conj(np.fft.rfft2(outlines))
    names, radii = zip(*candidates, strict=True)
    return list(names), list(radii), spectra, np.sum(outlines**2, axis=(1, 2))
