"""DDIM: which timesteps a sampler visits and the update between two of them, without added noise.

Source: Song et al. 2020, arXiv 2010.02502, equation 12 with eta 0; timestep spacing as Lin et al.
2023, arXiv 2305.08891, table 2, and diffusers' DDIMScheduler spell it, with Stable Diffusion's
steps_offset 1 and set_alpha_to_one false.
"""

from typing import assert_never

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdx.config.schema import PredictionType, TimestepSpacing
from sdx.diffusion.objective import latents_and_noise
from sdx.diffusion.schedule import NoiseSchedule

STEPS_OFFSET = 1  # in the scheduler config of every Stable Diffusion release


class SamplerError(ValueError):
    """A sampler cannot take the steps asked for."""


def timesteps(
    spacing: TimestepSpacing, num_timesteps: int, num_steps: int
) -> Int[np.ndarray, " steps"]:
    """The timesteps a sampler visits, from noisy to clean; int32.

    Raises SamplerError when the schedule has too few timesteps for `num_steps`.
    """
    longest = num_timesteps - 1 if spacing is TimestepSpacing.leading else num_timesteps
    if not 1 <= num_steps <= longest:
        raise SamplerError(
            f"sample.num_steps={num_steps}: must lie between 1 and {longest} with "
            f"diffusion.num_train_timesteps={num_timesteps} and "
            f"diffusion.timestep_spacing={spacing.name}."
        )
    match spacing:
        case TimestepSpacing.leading:
            visited = np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + STEPS_OFFSET
        case TimestepSpacing.trailing:
            visited = (
                np.round(num_timesteps - np.arange(num_steps) * (num_timesteps / num_steps)) - 1
            )
        case TimestepSpacing.linspace:
            visited = np.round(np.linspace(0, num_timesteps - 1, num_steps))[::-1]
        case _:
            assert_never(spacing)
    return visited.astype(np.int32)


def previous_timesteps(
    visited: Int[np.ndarray, " steps"], num_timesteps: int
) -> Int[np.ndarray, " steps"]:
    """The timestep each update ends at; 0 behind the last one, whose a_t Stable Diffusion takes."""
    return np.maximum(visited - num_timesteps // len(visited), 0).astype(np.int32)


def update(
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    prediction: Float[Array, "b h w c"],
    noisy: Float[Array, "b h w c"],
    timestep: Int[Array, ""],
    previous: Int[Array, ""],
) -> Float[Array, "b h w c"]:
    """Latents at the timestep `previous` from `noisy` ones at `timestep`.

    x_previous = sqrt(a_previous) * x0 + sqrt(1 - a_previous) * noise
    """
    size = noisy.shape[:1]
    latents, noise = latents_and_noise(
        prediction_type, schedule, prediction, noisy, jnp.broadcast_to(timestep, size)
    )
    return schedule.add_noise(latents, noise, jnp.broadcast_to(previous, size))
