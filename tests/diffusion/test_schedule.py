"""The noise schedule against diffusers', and its own identities."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import BetaSchedule, DiffusionConfig
from sdx.diffusion.schedule import NoiseSchedule, make_schedule

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kind", BetaSchedule)
@pytest.mark.parametrize("length", [1000, 37])
def test_tables_are_diffusers_to_the_last_bit(kind: BetaSchedule, length: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        length, beta_start=0.00085, beta_end=0.012, beta_schedule=kind.name
    )
    ours = make_schedule(DiffusionConfig(num_train_timesteps=length, beta_schedule=kind))
    np.testing.assert_array_equal(ours.betas, theirs.betas.numpy())
    np.testing.assert_array_equal(ours.alphas_cumprod, theirs.alphas_cumprod.numpy())
    assert ours.num_timesteps == length


def test_published_ends_of_stable_diffusion() -> None:
    schedule = make_schedule(DiffusionConfig())
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-6)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize("kind", BetaSchedule)
@pytest.mark.parametrize("length", [1000, 37])
def test_rescaled_tables_are_diffusers(kind: BetaSchedule, length: int) -> None:
    """Not to the last bit: torch's square roots on CPU differ by one with the vector width."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        length, beta_start=0.00085, beta_end=0.012, beta_schedule=kind.name,
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    ours = make_schedule(
        DiffusionConfig(
            num_train_timesteps=length, beta_schedule=kind, rescale_zero_terminal_snr=True
        )
    )
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=0, atol=2e-6)
    cumulative = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(ours.alphas_cumprod, cumulative, rtol=2e-6, atol=2e-7)
    assert cumulative[-1] == ours.alphas_cumprod[-1] == 0


def test_rescaled_betas_end_in_noise_alone() -> None:
    plain = make_schedule(DiffusionConfig())
    dark = make_schedule(DiffusionConfig(rescale_zero_terminal_snr=True))
    assert dark.alphas_cumprod[-1] == 0 and dark.betas[-1] == 1
    assert dark.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-6)
    assert np.isfinite(dark.snr(jnp.arange(1000))).all()


def test_noise_keeps_the_variance_and_snr_is_the_ratio() -> None:
    schedule = make_schedule(DiffusionConfig())
    timesteps = jnp.array([0, 500, 999])
    signal, sigma = schedule.coefficients(timesteps)
    np.testing.assert_allclose(signal**2 + sigma**2, 1, rtol=1e-6)
    np.testing.assert_allclose(schedule.snr(timesteps), ((signal / sigma) ** 2).ravel(), rtol=1e-5)


def test_noise_is_added_per_example() -> None:
    schedule = make_schedule(DiffusionConfig())
    ones = jnp.ones((2, 1, 1, 1))
    noisy = schedule.add_noise(ones, 10 * ones, jnp.array([0, 999]))
    tables = schedule.alphas_cumprod[[0, 999]]
    np.testing.assert_allclose(noisy.ravel(), np.sqrt(tables) + 10 * np.sqrt(1 - tables), rtol=1e-6)


def test_snr_is_zero_where_no_signal_is_left() -> None:
    schedule = NoiseSchedule(np.ones(1, np.float32), np.zeros(1, np.float32))
    assert schedule.snr(jnp.array([0]))[0] == 0
