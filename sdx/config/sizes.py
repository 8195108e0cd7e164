"""The sizes that training images can have: the square, or the shapes of aspect-ratio buckets."""

import math

from sdx.config import resolve
from sdx.config.schema import Config, DownBlock

BUCKET_RATIOS = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1))
"""Width to height; wider and taller images go to the last and the first."""

Size = tuple[int, int]
"""Height and width in pixels."""


def image_sizes(config: Config) -> list[Size]:
    """All that may occur: which buckets are empty is known where the data is."""
    side = resolve.resolution(config)
    if not config.data.buckets:
        return [(side, side)]
    return bucket_sizes(side, resolve.vae_factor(config) * resolve.unet_factor(config))


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """The shapes for `BUCKET_RATIOS`: sides are multiples of `multiple`, the area is about that of
    the square of `resolution`, which is itself one of them. Ratios can share a shape.
    """

    def side(length: float) -> int:
        return max(1, round(length / multiple)) * multiple

    roots = [math.sqrt(width / height) for width, height in BUCKET_RATIOS]
    sizes = [(side(resolution / root), side(resolution * root)) for root in roots]
    return list(dict.fromkeys(sizes))


def attended_levels(config: Config) -> list[int]:
    """The UNet's levels with attention: the last has it in the middle, whatever its own blocks."""
    kinds = config.model.unet.down_block_types
    return [
        level
        for level, kind in enumerate(kinds)
        if kind is DownBlock.CrossAttnDownBlock2D or level + 1 == len(kinds)
    ]


def num_tokens(config: Config, size: Size, level: int) -> int:
    """Pixels of a level that attention sees as tokens, for images of `size`."""
    height, width = (side // resolve.vae_factor(config) >> level for side in size)
    return height * width
