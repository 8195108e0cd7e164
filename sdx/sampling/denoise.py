"""From noise to latents: the sampler's steps over one compiled update.

The loop is Python's. XLA's CPU kernels are 6 times slower inside a loop of its own, on accelerators
the dispatch of the next update hides behind the one that runs, and a signal can stop it anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdx.config.schema import PredictionType, TimestepSpacing
from sdx.diffusion import ddim
from sdx.diffusion.guidance import guided
from sdx.diffusion.schedule import NoiseSchedule


class SamplingStopped(Exception):
    """Drawing was asked to stop before it was done."""


@dataclass(frozen=True, eq=False)  # a static argument of jit: equal only to itself
class DenoiseRule:
    """What one update is made of."""

    predict: Callable[..., Any]
    """(params, noisy latents, timesteps, context) to the UNet's raw output."""
    schedule: NoiseSchedule
    prediction_type: PredictionType
    spacing: TimestepSpacing


def initial_latents(seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "b h w c"]:
    """The noise a picture starts from, a function of the seed and its place in the list alone."""
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def denoise(
    rule: DenoiseRule,
    params: Any,
    latents: Float[Array, "b h w c"],
    context: Float[Array, "b s d"],
    negative_context: Float[Array, "b s d"],
    *,
    num_steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Float[Array, "b h w c"]:
    """Clean latents, still multiplied by the scaling factor, from noise.

    A `guidance_scale` of 1 is no guidance: half the work, and `negative_context` is not looked at.
    Raises SamplerError for a number of steps the schedule does not have, SamplingStopped as soon
    as `should_stop`.
    """
    visited = ddim.timesteps(rule.spacing, rule.schedule.num_timesteps, num_steps)
    ends = ddim.previous_timesteps(visited, rule.schedule.num_timesteps)
    guidance = None
    if guidance_scale != 1:
        guidance = (negative_context, jnp.float32(guidance_scale), jnp.float32(guidance_rescale))
    for timestep, end in zip(visited, ends, strict=True):
        if should_stop():
            raise SamplingStopped
        latents = _update(rule, params, latents, context, guidance, timestep, end)
    return latents


@partial(jax.jit, static_argnums=0)
def _update(
    rule: DenoiseRule,
    params: Any,
    latents: Float[Array, "b h w c"],
    context: Float[Array, "b s d"],
    guidance: tuple[Array, Array, Array] | None,
    timestep: Int[Array, ""],
    end: Int[Array, ""],
) -> Float[Array, "b h w c"]:
    def predict(x: Array, timesteps: Array, context: Array) -> Array:
        return rule.predict(params, x, timesteps, context).astype(jnp.float32)

    predict_guided = predict if guidance is None else guided(predict, *guidance)
    prediction = predict_guided(latents, jnp.broadcast_to(timestep, latents.shape[:1]), context)
    return ddim.update(rule.prediction_type, rule.schedule, prediction, latents, timestep, end)
