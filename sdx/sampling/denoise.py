"""From noise to latents: the sampler's steps over one compiled update.

The loop is Python's. XLA's CPU kernels are 6 times slower inside a loop of its own, on accelerators
the dispatch of the next update hides behind the one that runs, and a signal can stop it anywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from sdx.config.schema import PredictionType, SamplerKind, TimestepSpacing
from sdx.diffusion.guidance import guided
from sdx.diffusion.plans import Step, make_plan
from sdx.diffusion.samplers import Memory, start_memory, update
from sdx.diffusion.schedule import NoiseSchedule


class SamplingStopped(Exception):
    """Drawing was asked to stop before it was done."""


@dataclass(frozen=True, eq=False)
class DenoiseRule:
    """How pictures are drawn with one network."""

    predict: Callable[..., Any]
    """(params, noisy latents, timesteps, context) to the UNet's raw output."""
    schedule: NoiseSchedule
    prediction_type: PredictionType
    spacing: TimestepSpacing
    kind: SamplerKind


def initial_latents(seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "b h w c"]:
    """The noise a picture starts from, a function of the seed and its place in the list alone."""
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def picture_keys(seed: int, count: int) -> UInt32[np.ndarray, "b k"]:
    """The random key of each picture, of the seed and its place alone, as raw data; for DDPM."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))
    return np.asarray(jax.random.key_data(keys))


def numbered_noise(
    seed: int, numbers: Sequence[int], shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "b h w c"], UInt32[np.ndarray, "b k"]]:
    """Initial noise (of `shape` each) and random keys of pictures of a set too large to be drawn at
    once: functions of the seed and a picture's number, whichever others are drawn beside it."""
    noise, more = jax.random.split(jax.random.key(seed))
    places = jnp.asarray(numbers, jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    latents = jax.vmap(lambda key: jax.random.normal(key, shape))(fold(noise, places))
    return np.asarray(latents), np.asarray(jax.random.key_data(fold(more, places)))


def denoise(
    rule: DenoiseRule,
    params: Any,
    latents: Float[Array, "b h w c"],
    keys: UInt32[Array, "b k"],
    context: Float[Array, "b s d"],
    negative_context: Float[Array, "b s d"],
    *,
    num_steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Float[Array, "b h w c"]:
    """Clean latents, still multiplied by the scaling factor, from noise of deviation 1.

    `keys` are `picture_keys`: what a random sampler draws. A `guidance_scale` of 1 is no guidance:
    half the work, and `negative_context` is not looked at. Raises SamplerError for what the sampler
    cannot do, SamplingStopped as soon as `should_stop`.
    """
    plan = make_plan(rule.kind, rule.schedule, rule.prediction_type, rule.spacing, num_steps)
    guidance = None
    if guidance_scale != 1:
        guidance = (negative_context, jnp.float32(guidance_scale), jnp.float32(guidance_rescale))
    latents = latents * plan.start_scale
    memory = start_memory(rule.kind, latents, keys)
    for step in plan:
        if should_stop():
            raise SamplingStopped
        latents, memory = _update(
            rule.predict,
            rule.kind,
            rule.prediction_type,
            params,
            step,
            latents,
            memory,
            context,
            guidance,
        )
    return latents


@partial(jax.jit, static_argnums=(0, 1, 2))
def _update(
    unet: Callable[..., Any],
    kind: SamplerKind,
    prediction_type: PredictionType,
    params: Any,
    step: Step,
    latents: Float[Array, "b h w c"],
    memory: Memory,
    context: Float[Array, "b s d"],
    guidance: tuple[Array, Array, Array] | None,
) -> tuple[Float[Array, "b h w c"], Memory]:
    def predict(x: Array, timesteps: Array, context: Array) -> Array:
        return unet(params, x, timesteps, context).astype(jnp.float32)

    predict_guided = predict if guidance is None else guided(predict, *guidance)
    timesteps = jnp.broadcast_to(step.timestep, latents.shape[:1])
    prediction = predict_guided(latents, timesteps, context)
    return update(kind, prediction_type, step, prediction, latents, memory)
