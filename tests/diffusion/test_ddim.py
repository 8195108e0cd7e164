"""DDIM and guidance against diffusers' scheduler, and against a Gaussian whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import DiffusionConfig, PredictionType, TimestepSpacing
from sdx.diffusion import ddim
from sdx.diffusion.guidance import guided
from sdx.diffusion.schedule import make_schedule

pytestmark = pytest.mark.fast
SCHEDULE = make_schedule(DiffusionConfig())


@pytest.mark.parametrize("spacing", TimestepSpacing)
@pytest.mark.parametrize("kind", PredictionType)
@pytest.mark.parametrize("num_steps", [10, 30, 7])
def test_trajectory_is_diffusers(
    spacing: TimestepSpacing, kind: PredictionType, num_steps: int
) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=kind.name,
        timestep_spacing=spacing.name,
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    visited = ddim.timesteps(spacing, 1000, num_steps)
    np.testing.assert_array_equal(visited, theirs.timesteps.numpy())
    draws = np.random.default_rng(0).normal(size=(num_steps + 1, 1, 4, 4, 4)).astype(np.float32)
    ours, reference = jnp.asarray(draws[0]), torch.tensor(draws[0])
    ends = ddim.previous_timesteps(visited, 1000)
    for timestep, end, prediction in zip(visited, ends, draws[1:], strict=True):
        ours = ddim.update(
            kind, SCHEDULE, jnp.asarray(prediction), ours, jnp.int32(timestep), jnp.int32(end)
        )
        reference = theirs.step(
            torch.tensor(prediction), int(timestep), reference, eta=0.0
        ).prev_sample
        scale = max(1.0, float(reference.abs().max()))
        np.testing.assert_allclose(ours, reference.numpy(), atol=1e-5 * scale)


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    assert len(ddim.timesteps(TimestepSpacing.trailing, 1000, 1000)) == 1000
    with pytest.raises(
        ddim.SamplerError, match="sample.num_steps=1000: must lie between 1 and 999"
    ):
        ddim.timesteps(TimestepSpacing.leading, 1000, 1000)
    with pytest.raises(ddim.SamplerError, match="sample.num_steps=0"):
        ddim.timesteps(TimestepSpacing.linspace, 1000, 0)


def test_a_known_gaussian_is_recovered() -> None:
    """For data of mean m and deviation d the best noise prediction is linear, so the end is known:
    m + d * start."""
    mean, deviation = 2.0, 0.5
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32, 32, 4)), jnp.float32)
    start = x
    visited = ddim.timesteps(TimestepSpacing.trailing, 1000, 1000)
    for timestep, end in zip(visited, ddim.previous_timesteps(visited, 1000), strict=True):
        a = float(SCHEDULE.alphas_cumprod[timestep])
        variance = a * deviation**2 + 1 - a
        noise = (x - a**0.5 * mean) * (1 - a) ** 0.5 / variance
        x = ddim.update(
            PredictionType.epsilon, SCHEDULE, noise, x, jnp.int32(timestep), jnp.int32(end)
        )
    np.testing.assert_allclose(x, mean + deviation * start, atol=0.1)


def test_guidance_moves_away_from_the_negative() -> None:
    def predict(latents: jnp.ndarray, timesteps: jnp.ndarray, context: jnp.ndarray) -> jnp.ndarray:
        return (
            latents + context[:, :1, :1, None] + timesteps[:, None, None, None].astype(jnp.float32)
        )

    latents, timesteps = jnp.ones((2, 2, 2, 1)), jnp.array([1, 2])
    positive = jnp.array([3.0, 5.0]).reshape(2, 1, 1)
    negative = jnp.ones((2, 1, 1))
    out = guided(predict, negative, jnp.float32(7.5), jnp.float32(0))(latents, timesteps, positive)
    np.testing.assert_allclose(out[:, 0, 0, 0], [2 + 1 + 7.5 * 2, 3 + 1 + 7.5 * 4])


def test_rescaled_guidance_has_the_deviation_of_the_positive_prediction() -> None:
    def predict(latents: jnp.ndarray, timesteps: jnp.ndarray, context: jnp.ndarray) -> jnp.ndarray:
        return latents * context[:, :1, :1, None]

    latents, timesteps = jnp.arange(8.0).reshape(1, 2, 2, 2), jnp.array([1])
    negative, positive = jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 2.0)

    def deviation(rescale: float) -> float:
        predict_guided = guided(predict, negative, jnp.float32(7.5), jnp.float32(rescale))
        return float(predict_guided(latents, timesteps, positive).std())

    wanted, pushed = float((2 * latents).std()), float((8.5 * latents).std())
    assert deviation(0) == pytest.approx(pushed, rel=1e-6)
    assert deviation(1) == pytest.approx(wanted, rel=1e-6)
    assert deviation(0.5) == pytest.approx((wanted + pushed) / 2, rel=1e-6)
