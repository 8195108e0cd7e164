"""Targets, conversions between predictions, and Min-SNR weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import DiffusionConfig, PredictionType
from sdx.diffusion.objective import (
    latents_and_noise,
    make_objective,
    snr_weights,
    target,
)
from sdx.diffusion.schedule import NoiseSchedule, make_schedule

pytestmark = pytest.mark.fast
SCHEDULE = make_schedule(DiffusionConfig())
TIMESTEPS = jnp.array([0, 250, 999])


def draws() -> tuple[jax.Array, jax.Array]:
    latents, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 4))
    return latents, noise


@pytest.mark.parametrize("kind", PredictionType)
def test_a_perfect_prediction_gives_back_latents_and_noise(kind: PredictionType) -> None:
    latents, noise = draws()
    noisy = SCHEDULE.add_noise(latents, noise, TIMESTEPS)
    perfect = target(kind, SCHEDULE, latents, noise, TIMESTEPS)
    signal, sigma = SCHEDULE.coefficients(TIMESTEPS)
    back_latents, back_noise = latents_and_noise(kind, perfect, noisy, signal=signal, sigma=sigma)
    np.testing.assert_allclose(back_latents, latents, atol=1e-4)  # epsilon divides by 0.07 at 999
    np.testing.assert_allclose(back_noise, noise, atol=1e-4)


def test_velocity_is_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    latents, noise = draws()
    ours = target(PredictionType.v_prediction, SCHEDULE, latents, noise, TIMESTEPS)
    velocity = theirs.get_velocity(
        *(torch.tensor(np.array(x)) for x in (latents, noise, TIMESTEPS))
    )
    np.testing.assert_allclose(ours, velocity.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", PredictionType)
def test_min_snr_weights_are_diffusers(kind: PredictionType) -> None:
    timesteps = jnp.arange(1000)
    snr = SCHEDULE.alphas_cumprod.astype(np.float64) / (1 - SCHEDULE.alphas_cumprod)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind.name]
    expected = np.minimum(snr, 5) / divisor
    np.testing.assert_allclose(snr_weights(kind, SCHEDULE, timesteps, 5.0), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "limit"), [(PredictionType.epsilon, 1), (PredictionType.v_prediction, 0)]
)
def test_weights_are_finite_without_any_signal(kind: PredictionType, limit: float) -> None:
    dark = NoiseSchedule(np.ones(1, np.float32), np.zeros(1, np.float32))
    assert snr_weights(kind, dark, jnp.array([0]), 5.0)[0] == limit


@pytest.mark.parametrize("kind", PredictionType)
def test_weights_are_finite_at_zero_terminal_snr(kind: PredictionType) -> None:
    diffusion = DiffusionConfig(rescale_zero_terminal_snr=True, snr_gamma=5.0)
    objective = make_objective(diffusion, kind)
    assert objective.schedule.alphas_cumprod[-1] == 0
    weights = objective.weigh(jnp.ones(1000), jnp.arange(1000))
    assert bool(jnp.isfinite(weights).all()) and bool((weights[:-1] > 0).all())


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_dream_is_diffusers(power: float) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    objective = make_objective(DiffusionConfig(dream=power), PredictionType.epsilon)
    latents, noise = draws()
    noisy = objective.schedule.add_noise(latents, noise, TIMESTEPS)
    ours = objective.rectify(lambda x: jnp.tanh(x) * 0.7, noisy, noise, TIMESTEPS)

    class Output:
        def __init__(self, sample: Any) -> None:
            self.sample = sample

    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    theirs = training_utils.compute_dream_and_update_latents(
        lambda sample, timesteps, context: Output(torch.tanh(sample) * 0.7),
        scheduler,
        *(torch.tensor(np.array(x)) for x in (TIMESTEPS, noise, noisy, noise)),
        encoder_hidden_states=None,
        dream_detail_preservation=power,
    )
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, reference.numpy(), atol=1e-6)


def test_dream_is_for_epsilon() -> None:
    with pytest.raises(AssertionError, match="dream"):
        make_objective(DiffusionConfig(dream=1.0), PredictionType.v_prediction)
