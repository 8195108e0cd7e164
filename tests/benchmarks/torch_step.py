"""The training step of torch diffusers, eager, that benchmarks compare with."""

from dataclasses import asdict
from typing import Any

from sdx.config.schema import DownBlock, UNetConfig


def make_unet(config: UNetConfig) -> Any:
    """diffusers' UNet of `config`, with its own random weights, ready to be trained."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    levels = config.down_block_types
    ups = {
        DownBlock.CrossAttnDownBlock2D: "CrossAttnUpBlock2D",
        DownBlock.DownBlock2D: "UpBlock2D",
    }
    fields = asdict(config) | {
        "block_out_channels": tuple(config.block_out_channels),
        "attention_head_dim": tuple(config.attention_head_dim),
        "down_block_types": tuple(level.name for level in levels),
        "up_block_types": tuple(ups[level] for level in reversed(levels)),
    }
    return UNet2DConditionModel(**fields).train()


def make_optimizer(unet: Any, lr: float, weight_decay: float) -> Any:
    """AdamW as diffusers' training script makes it."""
    import torch

    return torch.optim.AdamW(unet.parameters(), lr=lr, weight_decay=weight_decay)


def update(
    unet: Any,
    optimizer: Any,
    noisy: Any,
    timesteps: Any,
    context: Any,
    target: Any,
    *,
    max_norm: float,
) -> tuple[Any, Any]:
    """Forward, mean squared error in float32, backward, clip, AdamW: loss and gradient norm, as
    tensors that nothing has waited for."""
    import torch

    optimizer.zero_grad()
    prediction = unet(noisy, timesteps, context).sample
    loss = torch.nn.functional.mse_loss(prediction.float(), target)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), max_norm)
    optimizer.step()
    return loss.detach(), norm
