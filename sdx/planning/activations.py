"""What the layers of the networks keep for their backward pass, counted from the configuration.

Bytes for one example, before anything is fitted: every array that autodiff keeps is counted once in
the type it is stored in, as `jax.ad_checkpoint.print_saved_residuals` lists them with elementwise
copies left out, which XLA computes again. What a compiler makes of it is in temporaries.py.

A TPU stores rows of 128 lanes: heads of 64 numbers take twice their size, and Pallas' flash kernel
keeps maximum and sum of each query as a whole row each
(jax.experimental.pallas.ops.tpu.flash_attention, MIN_BLOCK_SIZE).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sdx.config import resolve
from sdx.config.schema import Config, DownBlock, Platform, TextEncoderConfig
from sdx.models.attention import FEED_FORWARD_FACTOR
from sdx.models.attention_choice import ByShape, select_attention

LANES = 128
FLASH_TILE = 512  # keys of a tile of the flash kernel, as wide as what its backward spreads out
FLOAT = 4


@dataclass(frozen=True)
class Layer:
    """A ResNet block with the attention after it, or a convolution between levels; bytes for one
    example."""

    path: tuple[str, ...]
    """Prefixes of the parameters' paths."""
    level: str
    entry: float
    """Its input, which stays under any remat."""
    rest: float
    """What it keeps beyond that without remat."""
    products: float
    """What of `rest` `dots` keeps: outcomes of convolutions and products."""
    between: float
    """The others of `rest`, which it computes again."""
    passing: float
    """Largest arrays of its own backward pass, gone after it."""


@dataclass(frozen=True)
class _Sizes:
    """What one example is made of on this platform."""

    config: Config
    width: int
    """Bytes of a number in the compute type."""
    tensor: int
    """Devices that share heads and feed-forward."""
    is_tpu: bool
    attention: object

    def lanes(self, size: int) -> int:
        """A row of `size` numbers as it is stored."""
        return math.ceil(size / LANES) * LANES if self.is_tpu else size

    def shares(self, heads: int) -> int:
        """Devices among which the rows of attention's weights are split: by query or by head."""
        by_query = self.config.attention.shard_sequence
        return self.tensor if by_query or heads % self.tensor == 0 else 1

    def takes(self, length: int, head_dim: int) -> bool:
        """Whether a fused kernel computes self-attention of these sizes."""
        return isinstance(self.attention, ByShape) and self.attention.takes(
            length, length, head_dim
        )


def unet_layers(config: Config, latents: tuple[int, int], tensor: int) -> list[Layer]:
    """The UNet's layers in the order of its forward pass, for latents of that height and width."""
    sizes = _sizes(config, tensor)
    return [*_way_down(sizes, latents), *_middle(sizes, latents), *_way_up(sizes, latents)]


def text_layers(config: Config, tensor: int) -> list[Layer]:
    """The text encoder's, where it is trained."""
    text, sizes = config.model.text_encoder, _sizes(config, tensor)
    return [
        _text_layer(text, sizes, f"text_encoder/encoder/layers/{index}/")
        for index in range(text.num_hidden_layers)
    ]


def encoding_bytes(config: Config, image: tuple[int, int]) -> float:
    """The largest arrays that are alive at once while the autoencoder encodes one image of that
    height and width: of its first level the norms' float32, or its attention's weights."""
    vae, sizes = config.model.vae, _sizes(config, 1)
    pixels = image[0] * image[1]
    norm = max(
        (pixels >> 2 * level) * sizes.lanes(width) * (3 * FLOAT + sizes.width)
        for level, width in enumerate(vae.block_out_channels)
    )
    length = pixels // vae.factor**2
    attention = length**2 * (2 * FLOAT + sizes.width)
    if sizes.takes(length, vae.block_out_channels[-1]):
        attention = 0
    return float(max(norm, attention))


def _sizes(config: Config, tensor: int) -> _Sizes:
    dtype, platform = resolve.activations_dtype(config), config.hardware.platform
    return _Sizes(
        config=config,
        width=2 if dtype == "bfloat16" else FLOAT,
        tensor=tensor,
        is_tpu=platform is Platform.tpu,
        attention=select_attention(config.attention, platform, dtype=dtype),
    )


def _levels(config: Config, latents: tuple[int, int]) -> list[tuple[int, int, int | None]]:
    """Pixels, channels and heads (None without attention) of each level."""
    unet, (h, w), levels = config.model.unet, latents, []
    rows = zip(unet.block_out_channels, unet.down_block_types, unet.attention_head_dim, strict=True)
    for channels, kind, heads in rows:
        has_attention = kind is DownBlock.CrossAttnDownBlock2D
        levels.append((h * w, channels, heads if has_attention else None))
        h, w = -(-h // 2), -(-w // 2)
    return levels


def _way_down(sizes: _Sizes, latents: tuple[int, int]) -> Iterator[Layer]:
    unet, levels = sizes.config.model.unet, _levels(sizes.config, latents)
    yield _convolution(sizes, "conv_in/", "down", levels[0][0], unet.in_channels, levels[0][:2])
    for i, (pixels, channels, heads) in enumerate(levels):
        name, before = f"down_blocks/{i}/", levels[max(i - 1, 0)][1]
        for j in range(unet.layers_per_block):
            channels_in = before if j == 0 else channels
            yield _layer(sizes, name, j, pixels, (channels_in, 0), channels, heads)
        if i + 1 < len(levels):
            after = (levels[i + 1][0], channels)
            yield _convolution(sizes, f"{name}downsamplers/", name, pixels, channels, after)


def _middle(sizes: _Sizes, latents: tuple[int, int]) -> Iterator[Layer]:
    pixels, channels, _ = _levels(sizes.config, latents)[-1]
    heads = sizes.config.model.unet.attention_head_dim[-1]
    for index, found in enumerate((heads, None)):
        yield _layer(sizes, "mid_block/", index, pixels, (channels, 0), channels, found)


def _way_up(sizes: _Sizes, latents: tuple[int, int]) -> Iterator[Layer]:
    unet, levels = sizes.config.model.unet, _levels(sizes.config, latents)
    last = len(levels) - 1
    for place, i in enumerate(range(last, -1, -1)):
        pixels, channels, heads = levels[i]
        name, count = f"up_blocks/{place}/", unet.layers_per_block
        below, above = levels[min(i + 1, last)][1], levels[max(i - 1, 0)][1]
        inputs, skips = [below] + [channels] * count, [channels] * count + [above]
        for j, joined in enumerate(zip(inputs, skips, strict=True)):
            yield _layer(sizes, name, j, pixels, joined, channels, heads)
        if i > 0:
            after = (levels[i - 1][0], channels)
            yield _convolution(sizes, f"{name}upsamplers/", name, pixels, channels, after)
    out = (levels[0][0], unet.out_channels)
    yield _convolution(sizes, "conv_out/", "out", levels[0][0], levels[0][1], out, with_norm=True)


def _convolution(
    sizes: _Sizes,
    path: str,
    level: str,
    pixels: int,
    channels: int,
    after: tuple[int, int],
    *,
    with_norm: bool = False,
) -> Layer:
    """A convolution between levels; a larger outcome is of an enlarged input."""
    entry = pixels * sizes.lanes(channels) * sizes.width
    enlarged = after[0] * sizes.lanes(channels) * sizes.width if after[0] > pixels else 0
    return Layer(
        path=(f"unet/{path}",),
        level=level,
        entry=entry,
        rest=entry if with_norm else 0,
        products=0,
        between=entry if with_norm else 0,
        passing=2 * enlarged + FLOAT * after[0] * after[1],
    )


def _layer(
    sizes: _Sizes,
    name: str,
    index: int,
    pixels: int,
    joined: tuple[int, int],
    channels: int,
    heads: int | None,
) -> Layer:
    """A ResNet block over an input joined with a skip, and attention where there are `heads`."""
    unit = pixels * sizes.width  # bytes of one channel
    both = sum(map(sizes.lanes, joined))
    wide = sizes.lanes(channels)
    outcomes = unit * channels * (2 if sum(joined) == channels else 3)
    rest = unit * (both * (2 if joined[1] else 1) + 2 * wide)
    passing = pixels * max(both, wide) * (2 * FLOAT + sizes.width)
    paths = (f"unet/{name}resnets/{index}/",)
    if heads is not None:
        more, products, moving = _transformer(sizes, pixels, channels, heads)
        rest, outcomes = rest + unit * wide + more, outcomes + products
        passing = max(passing, moving)
        paths += (f"unet/{name}attentions/{index}/",)
    entry, between = unit * sizes.lanes(joined[0]), rest - outcomes * wide / channels
    return Layer(paths, name, entry, rest, outcomes, between, passing)


def _transformer(
    sizes: _Sizes, pixels: int, channels: int, heads: int
) -> tuple[float, float, float]:
    """What a transformer block keeps, what of it are products, and what its backward passes."""
    wide, share = pixels * sizes.lanes(channels) * sizes.width, sizes.tensor
    head_dim = channels // heads
    everywhere = heads * pixels * sizes.lanes(head_dim) * sizes.width
    in_heads = everywhere / sizes.shares(heads)
    keys = everywhere if sizes.config.attention.shard_sequence else in_heads
    hidden = FEED_FORWARD_FACTOR * wide / share
    fused, passing = _self_attention(sizes, pixels, heads, head_dim)
    tokens = sizes.config.model.text_encoder.max_position_embeddings
    over_caption = heads * pixels * (-(-tokens // 8) * 8) * (FLOAT + sizes.width)
    over_caption /= sizes.shares(heads)
    # Norms and sums around the three parts; query, outcome, key and value of self-attention, query
    # and outcome of the other; the gate's and the value's halves, and the two factors of GEGLU.
    kept = 9 * wide + 2 * wide / share + 4 * in_heads + 2 * keys + fused + over_caption + 4 * hidden
    # Outcomes of products alone are stored with their pixels along the lanes: not filled up.
    plain = pixels * channels * sizes.width
    products = (4 + (4 + 2 * FEED_FORWARD_FACTOR) / share) * plain
    return kept, products, passing + in_heads + 2 * keys + 2 * hidden


def _self_attention(sizes: _Sizes, pixels: int, heads: int, head_dim: int) -> tuple[float, float]:
    """What the function of attention keeps beside its operands, and what its backward passes."""
    rows = heads * pixels / sizes.shares(heads)
    if not sizes.takes(pixels, head_dim):
        return rows * pixels * (FLOAT + sizes.width), 0.0
    if not sizes.is_tpu:
        return rows * FLOAT, rows * head_dim * FLOAT
    row = LANES * FLOAT
    return rows * 2 * row, rows * (2 * row + min(FLASH_TILE, pixels) * FLOAT)


def _text_layer(text: TextEncoderConfig, sizes: _Sizes, path: str) -> Layer:
    tokens, wide, share = text.max_position_embeddings, text.hidden_size, sizes.tensor
    unit = tokens * sizes.width
    weights = text.num_attention_heads * tokens**2 * (FLOAT + sizes.width) / share
    hidden = text.intermediate_size / share
    rest = unit * (3 * wide + 4 * wide / share + 2 * hidden) + weights
    return Layer(
        path=(path,),
        level=path,
        entry=unit * wide,
        rest=rest,
        products=rest,
        between=0,
        passing=FLOAT * tokens * hidden + weights,
    )
