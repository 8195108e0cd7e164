"""What the comparisons share: layouts, quick compilation, and the loss as diffusers' script writes
it."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import numpy as np
import torch
from numpy.typing import NDArray

# Compiling is the cost of these tests, and this is the same mathematics unoptimised.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quickly(function: Callable[..., Any], *args: Any) -> Any:
    """`function`, compiled for arguments like these without costly optimisation."""
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(array: Any) -> torch.Tensor:
    """An NHWC array as a torch tensor of its own."""
    return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())


def nhwc(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def script_loss(
    unet: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    *,
    prediction_type: str,
    snr_gamma: float | None,
) -> torch.Tensor:
    """The loss of diffusers' examples/text_to_image/train_text_to_image.py, with the library's own
    noise, velocity and signal-to-noise ratio."""
    diffusers: Any = import_module("diffusers")
    compute_snr = import_module("diffusers.training_utils").compute_snr
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    )
    noisy = scheduler.add_noise(latents, noise, timesteps)
    is_velocity = prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    prediction = unet(noisy, timesteps, context).sample
    if snr_gamma is None:
        return torch.nn.functional.mse_loss(prediction, target)
    snr = compute_snr(scheduler, timesteps)
    weights = torch.clamp(snr, max=snr_gamma) / (snr + 1 if is_velocity else snr)
    errors = torch.nn.functional.mse_loss(prediction, target, reduction="none")
    return (errors.mean(dim=(1, 2, 3)) * weights).mean()
