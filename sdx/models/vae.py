"""The image autoencoder of Stable Diffusion (diffusers `AutoencoderKL`).

Its epsilons and its encoder's lopsided padding differ from the UNet's.
"""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdx.config.schema import VAEConfig
from sdx.models.attention import AttentionFn, split_heads
from sdx.models.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    Linear,
    Numerics,
    ResnetBlock,
    Upsample,
)

VAE_NORM_EPS = 1e-6
# Strided convolutions of the encoder pad below and to the right (diffusers `Downsample2D`).
LOPSIDED = ((0, 1), (0, 1))


class AutoencoderKL(nnx.Module):
    """Images to the moments of their latents, and latents to images; images in [-1, 1]."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        attention: AttentionFn,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        precision: jax.lax.Precision,
        rngs: nnx.Rngs,
    ):
        numerics = Numerics(dtype, param_dtype, precision)
        parts = _Parts(config, attention, numerics, rngs)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(parts)
        self.decoder = Decoder(parts)
        self.quant_conv = Conv2d(moments, moments, 1, numerics=numerics, rngs=rngs)
        self.post_quant_conv = Conv2d(latents, latents, 1, numerics=numerics, rngs=rngs)

    def encode(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        """Mean and log-variance of the latents along channels; neither clipped nor scaled."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        """Images for `latents` that were divided by the scaling factor; not clipped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nnx.Module):
    """Images to moments before the last 1x1 convolution."""

    def __init__(self, parts: "_Parts"):
        config, widths = parts.config, parts.config.block_out_channels
        last = len(widths) - 1
        self.conv_in = Conv2d(config.in_channels, widths[0], **parts.common)
        self.down_blocks = nnx.List(
            EncoderLevel(widths[max(i - 1, 0)], widths[i], is_last=i == last, parts=parts)
            for i in range(len(widths))
        )
        self.mid_block = MidLevel(widths[last], parts)
        self.conv_norm_out = parts.norm(widths[last])
        self.conv_out = Conv2d(widths[last], 2 * config.latent_channels, **parts.common)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w m"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents after the first 1x1 convolution to images."""

    def __init__(self, parts: "_Parts"):
        config, widths = parts.config, parts.config.block_out_channels
        last = len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[last], **parts.common)
        self.mid_block = MidLevel(widths[last], parts)
        self.up_blocks = nnx.List(
            DecoderLevel(widths[min(i + 1, last)], widths[i], is_last=i == 0, parts=parts)
            for i in range(last, -1, -1)
        )
        self.conv_norm_out = parts.norm(widths[0])
        self.conv_out = Conv2d(widths[0], config.out_channels, **parts.common)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W o"]:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class EncoderLevel(nnx.Module):
    """ResNet blocks, then a halving of height and width (`DownEncoderBlock2D`)."""

    def __init__(self, in_channels: int, channels: int, *, is_last: bool, parts: "_Parts"):
        inputs = [in_channels] + [channels] * (parts.config.layers_per_block - 1)
        self.resnets = nnx.List(parts.resnet(width, channels) for width in inputs)
        self.downsamplers = (
            None if is_last else nnx.List([Downsample(channels, padding=LOPSIDED, **parts.common)])
        )

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderLevel(nnx.Module):
    """ResNet blocks, then a doubling of height and width (`UpDecoderBlock2D`)."""

    def __init__(self, in_channels: int, channels: int, *, is_last: bool, parts: "_Parts"):
        inputs = [in_channels] + [channels] * parts.config.layers_per_block
        self.resnets = nnx.List(parts.resnet(width, channels) for width in inputs)
        self.upsamplers = None if is_last else nnx.List([Upsample(channels, **parts.common)])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsamplers is None:
            return x
        return self.upsamplers[0](x, (2 * x.shape[1], 2 * x.shape[2]))


class MidLevel(nnx.Module):
    """ResNet block, attention over all pixels, ResNet block (`UNetMidBlock2D`)."""

    def __init__(self, channels: int, parts: "_Parts"):
        self.resnets = nnx.List(parts.resnet(channels, channels) for _ in range(2))
        self.attentions = nnx.List([PixelAttention(channels, parts)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class PixelAttention(nnx.Module):
    """Normalised attention with one head over the pixels, plus a shortcut."""

    def __init__(self, channels: int, parts: "_Parts"):
        self.group_norm = parts.norm(channels)
        self.to_q = Linear(channels, channels, **parts.common)
        self.to_k = Linear(channels, channels, **parts.common)
        self.to_v = Linear(channels, channels, **parts.common)
        self.to_out = nnx.List([Linear(channels, channels, **parts.common)])
        self.attention = parts.attention
        self.precision = parts.numerics.precision

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        pixels = self.group_norm(x).reshape(b, h * w, c)
        query, key, value = (
            split_heads(project(pixels), 1) for project in (self.to_q, self.to_k, self.to_v)
        )
        y = self.attention(query, key, value, upcast=False, precision=self.precision)
        return x + self.to_out[0](y.reshape(b, h * w, c)).reshape(b, h, w, c)


class _Parts:
    """What encoder and decoder are built of; no module, so none of it is a parameter."""

    def __init__(
        self, config: VAEConfig, attention: AttentionFn, numerics: Numerics, rngs: nnx.Rngs
    ):
        self.config = config
        self.attention = attention
        self.numerics = numerics
        self.common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}

    def norm(self, channels: int) -> GroupNorm:
        return GroupNorm(
            self.config.norm_num_groups, channels, eps=VAE_NORM_EPS, numerics=self.numerics
        )

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(
            in_channels,
            out_channels,
            time_features=None,
            num_groups=self.config.norm_num_groups,
            eps=VAE_NORM_EPS,
            **self.common,
        )
