"""The Inception-v3 that FID is defined on, up to its 2048 features.

It is the network TensorFlow published on 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567), as
pytorch-fid ported it (src/pytorch_fid/inception.py), with torchvision's names of modules. It is
not torchvision's network: average pools do not count their padding, and the last block has a max
pool in an average's place. Batch norms are part of the convolutions before them
(weights/inception.py); pictures come prepared (scores/inception_input.py).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sdx.models.layers import Conv2d, Numerics

NUM_FEATURES = 2048

# A convolution: name, output channels, kernel (height, width), stride. Those of stride 1 keep the
# size, those of stride 2 have no padding.
Layer = tuple[str, int, tuple[int, int], int]
Pool = Literal["average", "max", "halving max"]
# A branch: one after the other; a list of layers sees the same and is concatenated.
Branch = tuple[Layer | Pool | list[Layer], ...]

ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
WIDE, TALL = (1, 7), (7, 1)  # 49 weights as 7 + 7


def block_a(pool_channels: int) -> tuple[Branch, ...]:
    """torchvision's InceptionA."""
    return (
        (("branch1x1", 64, ONE, 1),),
        (("branch5x5_1", 48, ONE, 1), ("branch5x5_2", 64, FIVE, 1)),
        (
            ("branch3x3dbl_1", 64, ONE, 1),
            ("branch3x3dbl_2", 96, THREE, 1),
            ("branch3x3dbl_3", 96, THREE, 1),
        ),
        ("average", ("branch_pool", pool_channels, ONE, 1)),
    )


BLOCK_B: tuple[Branch, ...] = (
    (("branch3x3", 384, THREE, 2),),
    (
        ("branch3x3dbl_1", 64, ONE, 1),
        ("branch3x3dbl_2", 96, THREE, 1),
        ("branch3x3dbl_3", 96, THREE, 2),
    ),
    ("halving max",),
)


def block_c(channels: int) -> tuple[Branch, ...]:
    """torchvision's InceptionC."""
    return (
        (("branch1x1", 192, ONE, 1),),
        (
            ("branch7x7_1", channels, ONE, 1),
            ("branch7x7_2", channels, WIDE, 1),
            ("branch7x7_3", 192, TALL, 1),
        ),
        (
            ("branch7x7dbl_1", channels, ONE, 1),
            ("branch7x7dbl_2", channels, TALL, 1),
            ("branch7x7dbl_3", channels, WIDE, 1),
            ("branch7x7dbl_4", channels, TALL, 1),
            ("branch7x7dbl_5", 192, WIDE, 1),
        ),
        ("average", ("branch_pool", 192, ONE, 1)),
    )


BLOCK_D: tuple[Branch, ...] = (
    (("branch3x3_1", 192, ONE, 1), ("branch3x3_2", 320, THREE, 2)),
    (
        ("branch7x7x3_1", 192, ONE, 1),
        ("branch7x7x3_2", 192, WIDE, 1),
        ("branch7x7x3_3", 192, TALL, 1),
        ("branch7x7x3_4", 192, THREE, 2),
    ),
    ("halving max",),
)


def block_e(pool: Pool) -> tuple[Branch, ...]:
    """torchvision's InceptionE."""
    return (
        (("branch1x1", 320, ONE, 1),),
        (
            ("branch3x3_1", 384, ONE, 1),
            [("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)],
        ),
        (
            ("branch3x3dbl_1", 448, ONE, 1),
            ("branch3x3dbl_2", 384, THREE, 1),
            [("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)],
        ),
        (pool, ("branch_pool", 192, ONE, 1)),
    )


BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": BLOCK_B,
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": BLOCK_D,
    "Mixed_7b": block_e("average"),
    "Mixed_7c": block_e("max"),
}


class Inception(nnx.Module):
    """Pictures in [-1, 1] to their features."""

    def __init__(self, *, numerics: Numerics, rngs: nnx.Rngs):
        common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}
        none, one = _padding(ONE), _padding(THREE)
        self.Conv2d_1a_3x3 = Conv2d(3, 32, 3, stride=2, padding=none, **common)
        self.Conv2d_2a_3x3 = Conv2d(32, 32, 3, padding=none, **common)
        self.Conv2d_2b_3x3 = Conv2d(32, 64, 3, padding=one, **common)
        self.Conv2d_3b_1x1 = Conv2d(64, 80, 1, **common)
        self.Conv2d_4a_3x3 = Conv2d(80, 192, 3, padding=none, **common)
        channels = 192
        for name, branches in BLOCKS.items():
            block = Block(channels, branches, **common)
            setattr(self, name, block)
            channels = block.out_channels

    def __call__(self, pictures: Float[Array, "b H W 3"]) -> Float[Array, "b 2048"]:
        """The features FID compares (`pool3`); sides are 299, other sizes from 75 on are taken."""
        x = pictures
        for conv in (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3):
            x = jax.nn.relu(conv(x))
        x = _pool("halving max", x)
        for conv in (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3):
            x = jax.nn.relu(conv(x))
        x = _pool("halving max", x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return jnp.mean(x, axis=(1, 2))


class Block(nnx.Module):
    """Branches that see the same and are concatenated."""

    def __init__(
        self,
        in_channels: int,
        branches: tuple[Branch, ...],
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ):
        self.branches = branches
        self.out_channels = 0
        for branch in branches:
            channels = in_channels
            for part in branch:
                if isinstance(part, str):
                    continue
                for name, out_channels, kernel, stride in _listed(part):
                    padding = _padding(kernel if stride == 1 else ONE)
                    conv = Conv2d(
                        channels,
                        out_channels,
                        kernel,
                        stride=stride,
                        padding=padding,
                        numerics=numerics,
                        rngs=rngs,
                    )
                    setattr(self, name, conv)
                channels = sum(out_channels for _, out_channels, _, _ in _listed(part))
            self.out_channels += channels

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return jnp.concatenate([self._follow(branch, x) for branch in self.branches], axis=-1)

    def _follow(self, branch: Branch, x: Array) -> Array:
        for part in branch:
            if isinstance(part, str):
                x = _pool(part, x)
            else:
                convs = [getattr(self, name) for name, *_ in _listed(part)]
                x = jnp.concatenate([jax.nn.relu(conv(x)) for conv in convs], axis=-1)
        return x


def _listed(part: Layer | list[Layer]) -> list[Layer]:
    return part if isinstance(part, list) else [part]


def _padding(kernel: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What keeps the size."""
    h, w = kernel
    return ((h // 2, h // 2), (w // 2, w // 2))


def _pool(kind: str, x: Array) -> Array:
    """Over 3 x 3 pixels; an average is of those that there are."""
    if kind == "halving max":
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")
    if kind == "max":
        return nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)
