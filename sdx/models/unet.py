"""The denoising UNet of Stable Diffusion 1.x and 2.x (diffusers `UNet2DConditionModel`).

Parameter paths are diffusers' module names. `remat` chooses what the backward pass computes again
instead of keeping it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from sdx.config.schema import DownBlock, Remat, UNetConfig
from sdx.models.attention import AttentionFn, SpatialTransformer
from sdx.models.layers import (
    SAME,
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    Numerics,
    PlaceFn,
    ResnetBlock,
    Upsample,
    timestep_embedding,
)

TIME_FACTOR = 4  # width of the timestep's features over that of the first level


class UNet2DConditionModel(nnx.Module):
    """Predicts noise, velocity or sample from noisy latents, a timestep each and text states."""

    def __init__(
        self,
        config: UNetConfig,
        *,
        attention: AttentionFn,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        precision: jax.lax.Precision,
        remat: Remat,
        rngs: nnx.Rngs,
        skips_absent: bool = False,
        over_width: PlaceFn | None = None,
    ):
        numerics = Numerics(dtype, param_dtype, precision, over_width)
        parts = _Parts(config, attention, numerics, remat, rngs, skips_absent)
        widths = config.block_out_channels
        heads = [
            count if kind is DownBlock.CrossAttnDownBlock2D else None
            for kind, count in zip(config.down_block_types, config.attention_head_dim, strict=True)
        ]
        last = len(widths) - 1

        self.conv_in = Conv2d(config.in_channels, widths[0], numerics=numerics, rngs=rngs)
        self.time_embedding = TimestepEmbedding(
            widths[0], parts.time_features, numerics=numerics, rngs=rngs
        )
        self.down_blocks = nnx.List(
            DownLevel(widths[max(i - 1, 0)], widths[i], heads[i], is_last=i == last, parts=parts)
            for i in range(len(widths))
        )
        self.mid_block = MidLevel(widths[last], config.attention_head_dim[last], parts=parts)
        self.up_blocks = nnx.List(
            UpLevel(
                widths[min(i + 1, last)],
                widths[i],
                widths[max(i - 1, 0)],
                heads[i],
                is_last=i == 0,
                parts=parts,
            )
            for i in range(last, -1, -1)
        )
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, widths[0], eps=config.norm_eps, numerics=numerics
        )
        self.conv_out = Conv2d(widths[0], config.out_channels, numerics=numerics, rngs=rngs)
        self.flip_sin_to_cos = config.flip_sin_to_cos
        self.freq_shift = config.freq_shift
        self.time_channels = widths[0]
        self.remat = remat
        self.dtype = dtype

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Real[Array, " b"],
        context: Float[Array, "b s d"],
    ) -> Float[Array, "b h w o"]:
        """The prediction for `sample` (noisy latents) given `context` (text states), in `dtype`."""
        context = context.astype(self.dtype)
        time = self.time_embedding(
            timestep_embedding(
                timesteps,
                self.time_channels,
                flip_sin_to_cos=self.flip_sin_to_cos,
                freq_shift=self.freq_shift,
            )
        )
        x = self.conv_in(sample)
        skips = [x]
        for level in self.down_blocks:
            x, level_skips = _around_level(level, self.remat)(x, time, context)
            skips += level_skips
        x = _around_level(self.mid_block, self.remat)(x, time, context)
        for level in self.up_blocks:
            level_skips = [skips.pop() for _ in range(len(level.resnets))]
            size = skips[-1].shape[1:3] if skips else x.shape[1:3]
            x = _around_level(level, self.remat, static=(4,))(x, level_skips, time, context, size)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class TimestepEmbedding(nnx.Module):
    """Two products that make the timestep's sinusoids the features every ResNet block reads."""

    def __init__(self, channels: int, features: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.linear_1 = Linear(channels, features, numerics=numerics, rngs=rngs)
        self.linear_2 = Linear(features, features, numerics=numerics, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b e"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class DownLevel(nnx.Module):
    """`CrossAttnDownBlock2D`, or `DownBlock2D` where `num_heads` is None."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_heads: int | None,
        *,
        is_last: bool,
        parts: "_Parts",
    ):
        count = parts.config.layers_per_block
        inputs = [in_channels] + [channels] * (count - 1)
        self.resnets = nnx.List(parts.resnet(width, channels) for width in inputs)
        self.attentions = (
            None
            if num_heads is None
            else nnx.List(parts.attention(channels, num_heads) for _ in range(count))
        )
        common: dict[str, Any] = {"numerics": parts.numerics, "rngs": parts.rngs}
        self.downsamplers = (
            None if is_last else nnx.List([Downsample(channels, padding=SAME, **common)])
        )
        self.remat = parts.remat

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b e"], context: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b h2 w2 o"], list[Array]]:
        """The level's output, and what the way up will read: the output of every layer."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            layer = _Layer(resnet, None if self.attentions is None else self.attentions[i])
            x = _around_layer(layer, self.remat)([x], time, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidLevel(nnx.Module):
    """The lowest level: ResNet block, attention, ResNet block (`UNetMidBlock2DCrossAttn`)."""

    def __init__(self, channels: int, num_heads: int, *, parts: "_Parts"):
        self.resnets = nnx.List(parts.resnet(channels, channels) for _ in range(2))
        self.attentions = nnx.List([parts.attention(channels, num_heads)])
        self.remat = parts.remat

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b e"], context: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        layers = [_Layer(self.resnets[0], self.attentions[0]), _Layer(self.resnets[1], None)]
        for layer in layers:
            x = _around_layer(layer, self.remat)([x], time, context)
        return x


class UpLevel(nnx.Module):
    """`CrossAttnUpBlock2D`, or `UpBlock2D` where `num_heads` is None.

    `below` and `above` are the widths of the levels it comes from and goes to; its last layer
    reads a skip of the latter.
    """

    def __init__(
        self,
        below: int,
        channels: int,
        above: int,
        num_heads: int | None,
        *,
        is_last: bool,
        parts: "_Parts",
    ):
        count = parts.config.layers_per_block + 1
        inputs = [below] + [channels] * (count - 1)
        skips = [channels] * (count - 1) + [above]
        self.resnets = nnx.List(
            parts.resnet(width + skip, channels) for width, skip in zip(inputs, skips, strict=True)
        )
        self.attentions = (
            None
            if num_heads is None
            else nnx.List(parts.attention(channels, num_heads) for _ in range(count))
        )
        common: dict[str, Any] = {"numerics": parts.numerics, "rngs": parts.rngs}
        self.upsamplers = None if is_last else nnx.List([Upsample(channels, **common)])
        self.remat = parts.remat

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        skips: list[Array],
        time: Float[Array, "b e"],
        context: Float[Array, "b s d"],
        size: tuple[int, int],
    ) -> Float[Array, "b h2 w2 o"]:
        """The level's output, enlarged to `size`: the height and width of the level above."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            layer = _Layer(resnet, None if self.attentions is None else self.attentions[i])
            x = _around_layer(layer, self.remat)([x, skip], time, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


class _Parts:
    """What every level is built of; not a module, so nothing of it lands in the parameters."""

    def __init__(
        self,
        config: UNetConfig,
        attention: AttentionFn,
        numerics: Numerics,
        remat: Remat,
        rngs: nnx.Rngs,
        skips_absent: bool,
    ):
        self.config = config
        self.skips_absent = skips_absent
        self.attention_fn = attention
        self.numerics = numerics
        self.remat = remat
        self.rngs = rngs
        self.time_features = TIME_FACTOR * config.block_out_channels[0]

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(
            in_channels,
            out_channels,
            time_features=self.time_features,
            num_groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
            numerics=self.numerics,
            rngs=self.rngs,
        )

    def attention(self, channels: int, num_heads: int) -> SpatialTransformer:
        return SpatialTransformer(
            channels,
            context_features=self.config.cross_attention_dim,
            num_heads=num_heads,
            num_groups=self.config.norm_num_groups,
            use_linear_projection=self.config.use_linear_projection,
            upcast=self.config.upcast_attention,
            attention=self.attention_fn,
            numerics=self.numerics,
            rngs=self.rngs,
            skips_absent=self.skips_absent,
        )


class _Layer:
    """A ResNet block and the attention after it, over `inputs` joined along channels.

    The joining lies inside, so that recomputing never keeps the joined copy.
    """

    def __init__(self, resnet: ResnetBlock, attention: SpatialTransformer | None):
        self.resnet = resnet
        self.attention = attention

    def __call__(self, inputs: list[Array], time: Array, context: Array) -> Array:
        x = self.resnet(inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs, -1), time)
        return x if self.attention is None else self.attention(x, context)


def _keep_products(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Convolutions and products, but not attention's, which grow with the pixels squared."""
    if primitive.name == "conv_general_dilated":
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *inputs, **parameters
    )


def _around_layer(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    match remat:
        case Remat.none:
            return layer
        case Remat.dots:
            return jax.checkpoint(layer, policy=_keep_products)
        case Remat.blocks | Remat.full:
            return jax.checkpoint(layer)


def _around_level(
    level: Callable[..., Any], remat: Remat, static: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`full` recomputes whole levels, and their layers one by one while it does."""
    if remat is not Remat.full:
        return level
    return jax.checkpoint(level, static_argnums=static)
