"""Classifier-free guidance: where it pushes to, and what rescaling restores."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdx.diffusion.guidance import guided

pytestmark = pytest.mark.fast


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
