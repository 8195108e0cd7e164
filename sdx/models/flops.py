"""Floating-point operations of a forward pass for one example, counted from the config alone.

Only products and convolutions are counted, two operations to a multiply-add, attention's two
products included; norms and activations are left out, as in the figures others publish. A training
step without recomputation costs about three times the UNet's forward.
"""

from sdx.config.schema import DownBlock, TextEncoderConfig, UNetConfig, VAEConfig
from sdx.models.attention import FEED_FORWARD_FACTOR
from sdx.models.unet import TIME_FACTOR


def unet_forward_flops(
    config: UNetConfig, latent_h: int, latent_w: int, num_tokens: int = 77
) -> float:
    """One call of the UNet on one example; 804e9 for SD 2.1 at 64 x 64 latents."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    time = TIME_FACTOR * widths[0]
    sizes = _sizes(latent_h, latent_w, len(widths))

    def layer(i: int, in_channels: int, has_attention: bool) -> float:
        resnet = _resnet(sizes[i], in_channels, widths[i]) + time * widths[i]
        tokens = (sizes[i], num_tokens)
        return resnet + (_transformer(config, widths[i], *tokens) if has_attention else 0)

    macs = 9.0 * sizes[0] * widths[0] * (config.in_channels + config.out_channels)
    macs += time * (widths[0] + time)
    for i, kind in enumerate(config.down_block_types):
        has_attention = kind is DownBlock.CrossAttnDownBlock2D
        above, below = widths[max(i - 1, 0)], widths[min(i + 1, last)]
        count = config.layers_per_block
        macs += sum(layer(i, c, has_attention) for c in [above] + [widths[i]] * (count - 1))
        inputs, skips = [below] + [widths[i]] * count, [widths[i]] * count + [above]
        macs += sum(
            layer(i, c + skip, has_attention) for c, skip in zip(inputs, skips, strict=True)
        )
        if i < last:
            macs += 9.0 * sizes[i + 1] * widths[i] ** 2  # down
            macs += 9.0 * sizes[i] * widths[i + 1] ** 2  # up, at the level's own width
    macs += layer(last, widths[last], True) + layer(last, widths[last], False)
    return 2 * macs


def vae_encode_flops(config: VAEConfig, image_h: int, image_w: int) -> float:
    """The moments of one image; 1117e9 for Stable Diffusion at 512 x 512 pixels."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    sizes = _sizes(image_h, image_w, len(widths))
    moments = 2 * config.latent_channels
    macs = 9.0 * sizes[0] * config.in_channels * widths[0]
    for i, width in enumerate(widths):
        inputs = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block - 1)
        macs += sum(_resnet(sizes[i], c, width) for c in inputs)
        if i < last:
            macs += 9.0 * sizes[i + 1] * width**2
    macs += _vae_middle(widths[last], sizes[last])
    return 2 * (macs + sizes[last] * moments * (9.0 * widths[last] + moments))


def vae_decode_flops(config: VAEConfig, image_h: int, image_w: int) -> float:
    """The image of one set of latents; 2515e9 for Stable Diffusion at 512 x 512 pixels."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    sizes = _sizes(image_h, image_w, len(widths))
    latents = config.latent_channels
    macs = sizes[last] * latents * (latents + 9.0 * widths[last])
    macs += _vae_middle(widths[last], sizes[last])
    for i, width in enumerate(widths):
        inputs = [widths[min(i + 1, last)]] + [width] * config.layers_per_block
        macs += sum(_resnet(sizes[i], c, width) for c in inputs)
        if i > 0:
            macs += 9.0 * sizes[i - 1] * width**2
    return 2 * (macs + 9.0 * sizes[0] * widths[0] * config.out_channels)


def text_flops(config: TextEncoderConfig) -> float:
    """The states of one caption at full length; 45e9 for SD 2.1. The mask saves nothing."""
    tokens, width = config.max_position_embeddings, config.hidden_size
    projections = 4 * width**2 + 2 * width * config.intermediate_size
    return 2.0 * config.num_hidden_layers * tokens * (projections + 2 * tokens * width)


def _sizes(height: int, width: int, num_levels: int) -> list[int]:
    """Pixels of each level; a strided convolution rounds an odd side up."""
    sizes = []
    for _ in range(num_levels):
        sizes.append(height * width)
        height, width = -(-height // 2), -(-width // 2)
    return sizes


def _resnet(pixels: int, in_channels: int, channels: int) -> float:
    shortcut = in_channels * channels if in_channels != channels else 0
    return pixels * (9.0 * channels * (in_channels + channels) + shortcut)


def _transformer(config: UNetConfig, width: int, pixels: int, num_tokens: int) -> float:
    projections = 2 * width**2  # in and out
    self_attention = 4 * width**2 + 2 * pixels * width
    cross_attention = 2 * width**2 + 2 * num_tokens * width
    feed_forward = 3 * FEED_FORWARD_FACTOR * width**2  # gate and value, and back
    keys_and_values = 2 * num_tokens * config.cross_attention_dim * width
    per_pixel = projections + self_attention + cross_attention + feed_forward
    return float(pixels * per_pixel + keys_and_values)


def _vae_middle(width: int, pixels: int) -> float:
    attention = pixels * (4.0 * width**2 + 2 * pixels * width)
    return 2 * _resnet(pixels, width, width) + attention
