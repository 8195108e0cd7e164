"""What the UNet learns: its target, how one prediction turns into another, and the weight of each
example.

v-prediction: Salimans & Ho 2022, arXiv 2202.00512, appendix D. Min-SNR: Hang et al. 2023, arXiv
2303.09556, with diffusers' convention for v (train_text_to_image.py, snr_gamma).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdx.config.schema import DiffusionConfig, PredictionType
from sdx.diffusion.schedule import NoiseSchedule, make_schedule


@dataclass(frozen=True)
class Objective:
    """What a UNet is trained to output, and how much each example counts."""

    schedule: NoiseSchedule
    target: Callable[
        [Float[Array, "b h w c"], Float[Array, "b h w c"], Int[Array, " b"]],
        Float[Array, "b h w c"],
    ]
    """(latents, noise, timesteps) to what the UNet must output."""
    weigh: Callable[[Float[Array, " b"], Int[Array, " b"]], Float[Array, " b"]]
    """(shares of the examples in the loss, timesteps) to the shares that the loss gives them."""


def make_objective(diffusion: DiffusionConfig, prediction_type: PredictionType) -> Objective:
    """The objective that `diffusion` describes, for a UNet that outputs `prediction_type`."""
    schedule = make_schedule(diffusion)
    return Objective(
        schedule=schedule,
        target=partial(target, prediction_type, schedule),
        weigh=_weighing(prediction_type, schedule, diffusion.snr_gamma),
    )


def target(
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    latents: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
) -> Float[Array, "b h w c"]:
    """What the UNet must output for `latents` noised with `noise` at `timesteps`.

    v = sqrt(a_t) * noise - sqrt(1 - a_t) * latents
    """
    match prediction_type:
        case PredictionType.epsilon:
            return noise
        case PredictionType.v_prediction:
            signal, sigma = schedule.coefficients(timesteps)
            return signal * noise - sigma * latents
        case PredictionType.sample:
            return latents
    assert_never(prediction_type)


def latents_and_noise(
    prediction_type: PredictionType,
    prediction: Float[Array, "b h w c"],
    noisy: Float[Array, "b h w c"],
    *,
    signal: Float[Array, "..."],
    sigma: Float[Array, "..."],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """The clean latents and the noise that `prediction` implies for `noisy` latents.

    `signal` and `sigma` are their shares s and q there. With x = s * x0 + q * n:
    x0 = (x - q * n) / s = s * x - q * v,  n = (x - s * x0) / q = s * v + q * x.
    """
    match prediction_type:
        case PredictionType.epsilon:
            return (noisy - sigma * prediction) / signal, prediction
        case PredictionType.v_prediction:
            return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy
        case PredictionType.sample:
            return prediction, (noisy - signal * prediction) / sigma
    assert_never(prediction_type)


def snr_weights(
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    timesteps: Int[Array, " b"],
    gamma: float,
) -> Float[Array, " b"]:
    """Min-SNR weight of each example: min(snr, gamma), divided by snr for epsilon and by snr + 1
    for v.

    Finite at zero terminal SNR, where epsilon's quotient 0/0 has the limit 1.
    """
    snr = schedule.snr(timesteps)
    match prediction_type:
        case PredictionType.epsilon:
            return jnp.where(snr > gamma, gamma / snr, 1.0)
        case PredictionType.v_prediction:
            return jnp.minimum(snr, gamma) / (snr + 1)
        case PredictionType.sample:
            return jnp.minimum(snr, gamma)
    assert_never(prediction_type)


def _weighing(
    prediction_type: PredictionType, schedule: NoiseSchedule, gamma: float | None
) -> Callable[[Float[Array, " b"], Int[Array, " b"]], Float[Array, " b"]]:
    if gamma is None:
        return lambda shares, timesteps: shares
    return lambda shares, timesteps: (
        shares * snr_weights(prediction_type, schedule, timesteps, gamma)
    )
