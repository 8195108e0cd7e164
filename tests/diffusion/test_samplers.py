"""Updates: a Gaussian whose answer is known is recovered by every sampler."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import DiffusionConfig, PredictionType, SamplerKind, TimestepSpacing
from sdx.diffusion.plans import Step, make_plan
from sdx.diffusion.samplers import Memory, start_memory, update
from sdx.diffusion.schedule import make_schedule

pytestmark = pytest.mark.fast
SCHEDULE = make_schedule(DiffusionConfig())
MEAN, DEVIATION = 2.0, 0.5
# Largest error after 200 steps: it falls with the order. Measured: 0.024, 0.034, 0.013, 0.0006.
ERRORS = {
    SamplerKind.ddim: 0.03,
    SamplerKind.euler: 0.04,
    SamplerKind.dpmpp_2m: 0.016,
    SamplerKind.pndm: 0.001,
}


def drawn(kind: SamplerKind, start: Any, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What `kind` draws with the best prediction of noise for Gaussian data, and what it should.

    Along the flow, latents keep their distance from the mean in deviations of their level.
    """
    epsilon = PredictionType.epsilon
    plan = make_plan(kind, SCHEDULE, epsilon, TimestepSpacing.trailing, num_steps)
    keys = jnp.arange(2 * len(start), dtype=jnp.uint32).reshape(-1, 2)
    x = first = start * np.float32(plan.start_scale)
    memory = start_memory(kind, x, keys)
    for step in plan:
        x, memory = one_update(kind, jax.tree.map(jnp.asarray, step), x, memory)
    _, signal, sigma, end_signal, end_sigma, *_ = plan.steps
    distance = (first - signal[0] * MEAN) / deviation(signal[0], sigma[0])
    wanted = end_signal[-1] * MEAN + deviation(end_signal[-1], end_sigma[-1]) * distance
    return np.asarray(x), np.asarray(wanted)


def deviation(signal: Any, sigma: Any) -> Any:
    """Of noisy data at a level."""
    return ((signal * DEVIATION) ** 2 + sigma**2) ** 0.5


@partial(jax.jit, static_argnums=0)
def one_update(kind: SamplerKind, step: Step, x: jax.Array, memory: Memory) -> Any:
    # A retry starts where the first update did, but predicts at its end, where x has come to.
    signal = jnp.where(step.is_retry, step.end_signal, step.signal)
    sigma = jnp.where(step.is_retry, step.end_sigma, step.sigma)
    noise = (x - signal * MEAN) * sigma / deviation(signal, sigma) ** 2
    return update(kind, PredictionType.epsilon, step, noise, x, memory)


@pytest.mark.parametrize(("kind", "error"), ERRORS.items())
def test_a_known_gaussian_is_recovered(kind: SamplerKind, error: float) -> None:
    start = jnp.asarray(np.random.default_rng(1).normal(size=(1, 16, 16, 4)), jnp.float32)
    ours, wanted = drawn(kind, start, 200)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=error)


def test_ddpm_has_the_moments_of_the_gaussian() -> None:
    """Fresh noise at every step: the start is forgotten, the distribution is not."""
    start = jnp.asarray(np.random.default_rng(2).normal(size=(4, 32, 32, 4)), jnp.float32)
    ours, _ = drawn(SamplerKind.ddpm, start, 200)
    assert ours.mean() == pytest.approx(MEAN, abs=0.02)
    assert ours.std() == pytest.approx(DEVIATION, abs=0.03)  # the smaller of its two variances
    assert abs(np.corrcoef(ours.ravel(), np.asarray(start).ravel())[0, 1]) < 0.1
