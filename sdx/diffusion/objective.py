"""What the UNet learns: how examples are noised, the target, how one prediction turns into another,
and the weight of each example.

v-prediction: Salimans & Ho 2022, arXiv 2202.00512, appendix D. Min-SNR: Hang et al. 2023, arXiv
2303.09556, with diffusers' convention for v (train_text_to_image.py, snr_gamma). Noise offset:
Guttenberg 2023, crosslabs.org/blog/diffusion-with-offset-noise. Input perturbation: Ning et al.
2023, arXiv 2301.11706. DREAM: Zhou et al. 2024, arXiv 2312.00210.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sdx.config.schema import DiffusionConfig, PredictionType
from sdx.diffusion.schedule import NoiseSchedule, make_schedule
from sdx.diffusion.timesteps import DrawTimesteps, make_draw

Latents = Float[Array, "b h w c"]
Timesteps = Int[Array, " b"]
Streams = Callable[[str], Key[Array, ""]]
"""The key of each named random stream."""


def plain_noise(streams: Streams, shape: tuple[int, ...]) -> Float[Array, "b h w c"]:
    """Standard normal."""
    return jax.random.normal(streams("noise"), shape)


def unperturbed(streams: Streams, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The noise of the target."""
    return noise


def unweighed(shares: Float[Array, " b"], timesteps: Int[Array, " b"]) -> Float[Array, " b"]:
    """The shares as they are."""
    return shares


def unrectified(
    predict: Callable[[Latents], Latents],
    noisy: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Input and target as they are."""
    return noisy, target


@dataclass(frozen=True)
class Objective:
    """What a UNet is trained on and to output, and how much each example counts; every choice is
    made when it is built."""

    schedule: NoiseSchedule
    draw_timesteps: DrawTimesteps
    target: Callable[[Latents, Latents, Timesteps], Latents]
    """(latents, noise, timesteps) to what the UNet must output."""
    draw_noise: Callable[[Streams, tuple[int, ...]], Latents] = plain_noise
    """The noise that targets are made of, of that shape."""
    perturb: Callable[[Streams, Latents], Latents] = unperturbed
    """That noise to the one in the UNet's input."""
    weigh: Callable[[Float[Array, " b"], Timesteps], Float[Array, " b"]] = unweighed
    """(shares of the examples in the loss, timesteps) to the shares that the loss gives them."""
    rectify: Callable[
        [Callable[[Latents], Latents], Latents, Latents, Timesteps], tuple[Latents, Latents]
    ] = unrectified
    """(the UNet as a function of its noisy input, that input, target, timesteps) to the input and
    target that are trained."""


def make_objective(diffusion: DiffusionConfig, prediction_type: PredictionType) -> Objective:
    """The objective that `diffusion` describes, for a UNet that outputs `prediction_type`."""
    schedule = make_schedule(diffusion)
    chosen: dict[str, Callable[..., Any]] = {}
    if diffusion.noise_offset:
        chosen["draw_noise"] = partial(offset_noise, diffusion.noise_offset)
    if diffusion.input_perturbation:
        chosen["perturb"] = partial(perturbed, diffusion.input_perturbation)
    if diffusion.snr_gamma is not None:
        chosen["weigh"] = partial(min_snr, prediction_type, schedule, diffusion.snr_gamma)
    if diffusion.dream is not None:
        assert prediction_type is PredictionType.epsilon, "diffusion.dream: checked beforehand"
        chosen["rectify"] = partial(dream, schedule, diffusion.dream)
    return Objective(
        schedule=schedule,
        draw_timesteps=make_draw(diffusion.timestep_bias, schedule.num_timesteps),
        target=partial(target, prediction_type, schedule),
        **chosen,
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


def offset_noise(
    offset: float, streams: Streams, shape: tuple[int, ...]
) -> Float[Array, "b h w c"]:
    """Standard normal, and `offset` times a normal shift of each example and channel."""
    shift = jax.random.normal(streams("noise_offset"), (shape[0], 1, 1, shape[-1]))
    return plain_noise(streams, shape) + offset * shift


def perturbed(
    share: float, streams: Streams, noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """The noise of the target, and `share` times another that the target does not know."""
    return noise + share * jax.random.normal(streams("input_perturbation"), noise.shape)


def min_snr(
    prediction_type: PredictionType,
    schedule: NoiseSchedule,
    gamma: float,
    shares: Float[Array, " b"],
    timesteps: Int[Array, " b"],
) -> Float[Array, " b"]:
    """The shares times their Min-SNR weights."""
    return shares * snr_weights(prediction_type, schedule, timesteps, gamma)


def dream(
    schedule: NoiseSchedule,
    power: float,
    predict: Callable[[Latents], Latents],
    noisy: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Input and target moved towards the UNet's own error, as it would meet it when sampling.

    With q = sqrt(1 - a_t), n the noise and n' what the UNet takes for it: d = q^power (n - n') is
    added to the target and q d to the input. For epsilon, whose target is the noise. Reference:
    diffusers' compute_dream_and_update_latents (training_utils.py).
    """
    _, sigma = schedule.coefficients(timesteps)
    error = sigma**power * (target - predict(noisy))
    return noisy + sigma * error, target + error
