"""Aspect-ratio buckets: the shapes images are trained in, and which image goes to which.

Each image goes to the shape whose aspect ratio is nearest to its own, is resized to cover it and
cropped, so that little of it is lost and nothing distorted (NovelAI 2022, "Improvements on Stable
Diffusion"; their search over all sides is the table of nine ratios in config/sizes.py).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32, Int64

from sdx.config.sizes import Size, bucket_sizes
from sdx.data.source import DataError, Source


@dataclass(frozen=True)
class Buckets:
    """The shapes that occur, and which bucket each example of a source is in."""

    sizes: tuple[Size, ...]
    of_example: Int64[np.ndarray, " n"]

    @cached_property
    def members(self) -> list[Int64[np.ndarray, " m"]]:
        """Indices of each bucket's examples, in the source's order; none is empty."""
        return [np.flatnonzero(self.of_example == bucket) for bucket in range(len(self.sizes))]

    def size_of(self, index: int) -> Size:
        """The shape that this example is trained in."""
        return self.sizes[self.of_example[index]]

    def num_batches(self, batch_size: int) -> list[int]:
        """Batches of each bucket in an epoch, the partial one included."""
        return [-(-len(members) // batch_size) for members in self.members]

    def shares(self, batch_size: int) -> dict[Size, float]:
        """The part of all steps that trains in each shape."""
        counts = self.num_batches(batch_size)
        return {size: n / sum(counts) for size, n in zip(self.sizes, counts, strict=True)}


def nearest_buckets(sizes: Int32[np.ndarray, "n 2"], shapes: list[Size]) -> Int64[np.ndarray, " n"]:
    """For images of these heights and widths the number of the shape that is nearest in aspect
    ratio, on a logarithmic scale.
    """
    ratios = np.log(sizes[:, 1] / sizes[:, 0])
    wanted = np.log([width / height for height, width in shapes])
    return np.argmin(np.abs(ratios[:, None] - wanted[None, :]), axis=1).astype(np.int64)


def make_buckets(source: Source, resolution: int, multiple: int) -> Buckets:
    """The buckets of a source's images; DataError where it does not know their sizes."""
    sizes = getattr(source, "sizes", None)
    if sizes is None:
        raise DataError(
            "data.buckets=true: this source does not know the sizes of its images; give it an"
            " attribute `sizes` (height and width of each), or use data.buckets=false."
        )
    shapes = bucket_sizes(resolution, multiple)
    occurring, of_example = np.unique(nearest_buckets(sizes, shapes), return_inverse=True)
    return Buckets(tuple(shapes[i] for i in occurring), of_example.astype(np.int64))


def describe(buckets: Buckets) -> str:
    """`5 programs, one per bucket: 512x512 (120 images), 384x704 (3 images)`, height first."""
    parts = [
        f"{height}x{width} ({len(members)} images)"
        for (height, width), members in zip(buckets.sizes, buckets.members, strict=True)
    ]
    return f"{len(parts)} programs, one per bucket: {', '.join(parts)}"
