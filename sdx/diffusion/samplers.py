"""Samplers: the update from one noise level to the next.

All five are one formula. With an estimate of the clean latents x0 and the noise n in what the
update starts from, x = s * x0 + q * n, it ends at the level (s', q') of the plan with

    x' = s' * x0 + q' * n                 (Song et al. 2020, arXiv 2010.02502, equation 12)

and only the estimates differ:

    ddim      from this prediction alone
    euler     the same; Euler's step in x / s (Karras et al. 2022, arXiv 2206.00364, algorithm 2) is
              this formula between the levels of its own plan
    ddpm      part of n is drawn afresh (Ho et al. 2020, arXiv 2006.11239, equation 7, which is Song
              et al.'s equation 12 with eta 1)
    dpmpp_2m  x0 is extrapolated from this and the one before, n is the rest of x (Lu et al. 2022,
              arXiv 2211.01095, algorithm 2; midpoint, as diffusers' default)
    pndm      the prediction is a mean of up to four (Liu et al. 2022, arXiv 2202.09778, equations 9
              and 12, with PLMS's start in place of Runge-Kutta's)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, UInt32

from sdx.config.schema import PredictionType, SamplerKind
from sdx.diffusion.objective import latents_and_noise
from sdx.diffusion.plans import Step

Latents = Float[Array, "b h w c"]
Keys = UInt32[Array, "b k"]
"""The raw data of a random key for each picture."""
Memory = Any
"""What a sampler hands from one update to the next: a pytree of its own."""


def start_memory(kind: SamplerKind, latents: Latents, keys: Keys) -> Memory:
    """The memory of the first update, which starts from `latents`."""
    return _SAMPLERS[kind].start(latents, keys)


def update(
    kind: SamplerKind,
    prediction_type: PredictionType,
    step: Step,
    prediction: Latents,
    noisy: Latents,
    memory: Memory,
) -> tuple[Latents, Memory]:
    """The latents where `step` ends, from `noisy` ones where it starts, and the next memory."""
    estimate = _SAMPLERS[kind].estimate
    clean, noise, memory = estimate(prediction_type, step, prediction, noisy, memory)
    return step.end_signal * clean + step.end_sigma * noise, memory


def fresh_noise(keys: Keys, timestep: Real[Array, ""], shape: tuple[int, ...]) -> Latents:
    """What DDPM adds after `timestep`: for each picture a function of its own key alone."""

    def draw(key: UInt32[Array, " k"]) -> Float[Array, "h w c"]:
        return jax.random.normal(
            jax.random.fold_in(jax.random.wrap_key_data(key), timestep), shape[1:]
        )

    return jax.vmap(draw)(keys)


def _from_one(
    prediction_type: PredictionType, step: Step, prediction: Latents, noisy: Latents, memory: Memory
) -> tuple[Latents, Latents, Memory]:
    clean, noise = _separated(prediction_type, step, prediction, noisy)
    return clean, noise, memory


def _partly_fresh(
    prediction_type: PredictionType, step: Step, prediction: Latents, noisy: Latents, keys: Keys
) -> tuple[Latents, Latents, Memory]:
    clean, noise = _separated(prediction_type, step, prediction, noisy)
    fresh = fresh_noise(keys, step.timestep, noisy.shape)
    return clean, step.weights[0] * noise + step.weights[1] * fresh, keys


def _extrapolated(
    prediction_type: PredictionType,
    step: Step,
    prediction: Latents,
    noisy: Latents,
    before: Latents,
) -> tuple[Latents, Latents, Memory]:
    newest, _ = _separated(prediction_type, step, prediction, noisy)
    clean = step.weights[0] * newest + step.weights[1] * before
    return clean, (noisy - step.signal * clean) / step.sigma, newest


def _from_four(
    prediction_type: PredictionType, step: Step, prediction: Latents, noisy: Latents, memory: Memory
) -> tuple[Latents, Latents, Memory]:
    before, first = memory
    known = (prediction, *before)
    first_share, *shares = (step.weights[i] * one for i, one in enumerate(known))
    mean = sum(shares, first_share)
    start = jnp.where(step.is_retry, first, noisy)
    clean, noise = _separated(prediction_type, step, mean, start)
    kept = [jnp.where(step.is_retry, *pair) for pair in zip(before, known[:3], strict=True)]
    return clean, noise, (tuple(kept), first)


def _separated(
    prediction_type: PredictionType, step: Step, prediction: Latents, noisy: Latents
) -> tuple[Latents, Latents]:
    return latents_and_noise(
        prediction_type, prediction, noisy, signal=step.signal, sigma=step.sigma
    )


@dataclass(frozen=True)
class _Sampler:
    start: Callable[[Latents, Keys], Memory]
    estimate: Callable[
        [PredictionType, Step, Latents, Latents, Memory], tuple[Latents, Latents, Memory]
    ]
    """(..., step, prediction, noisy latents, memory) to clean latents, noise and next memory."""


# What is remembered at first has weight 0, so that the latents do for it.
_SAMPLERS = {
    SamplerKind.ddim: _Sampler(lambda latents, keys: (), _from_one),
    SamplerKind.euler: _Sampler(lambda latents, keys: (), _from_one),
    SamplerKind.ddpm: _Sampler(lambda latents, keys: keys, _partly_fresh),
    SamplerKind.dpmpp_2m: _Sampler(lambda latents, keys: latents, _extrapolated),
    SamplerKind.pndm: _Sampler(lambda latents, keys: ((latents,) * 3, latents), _from_four),
}
