"""How often each timestep is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import TimestepBias, TimestepBiasConfig
from sdx.diffusion.timesteps import make_draw, timestep_weights

pytestmark = pytest.mark.fast
TOTAL = 1000
BIASES = {
    TimestepBias.none: (TimestepBiasConfig(), range(0)),
    TimestepBias.earlier: (
        TimestepBiasConfig(TimestepBias.earlier, multiplier=3, portion=0.25),
        range(250),
    ),
    TimestepBias.later: (
        TimestepBiasConfig(TimestepBias.later, multiplier=0.5, portion=0.1),
        range(900, 1000),
    ),
    TimestepBias.range: (
        TimestepBiasConfig(TimestepBias.range, multiplier=4, begin=200, end=500),
        range(200, 501),  # the end is drawn too
    ),
}


@pytest.mark.parametrize("strategy", TimestepBias)
def test_the_timesteps_named_weigh_more_or_less(strategy: TimestepBias) -> None:
    bias, biased = BIASES[strategy]
    expected = np.array([bias.multiplier if t in biased else 1.0 for t in range(TOTAL)])
    found = timestep_weights(bias, TOTAL)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize("strategy", TimestepBias)
def test_frequencies_are_the_weights(strategy: TimestepBias) -> None:
    bias, biased = BIASES[strategy]
    draw = jax.jit(make_draw(bias, TOTAL), static_argnums=1)
    counts = np.bincount(draw(jax.random.key(0), 100_000), minlength=TOTAL)
    assert len(counts) == TOTAL
    expected = timestep_weights(bias, TOTAL) * counts.sum()
    edges = np.unique([*range(0, TOTAL, 50), biased.start, biased.stop % TOTAL])
    got, wanted = (np.add.reduceat(x, edges) for x in (counts, expected))
    assert ((got - wanted) ** 2 / wanted).sum() < 49.8  # chi-square, 23 degrees at most, 0.1 %


def test_both_ends_of_the_range_are_drawn_and_nothing_else() -> None:
    bias = TimestepBiasConfig(TimestepBias.range, multiplier=1e9, begin=998, end=999)
    drawn = make_draw(bias, TOTAL)(jax.random.key(0), 1000)
    assert drawn.dtype == jnp.int32 and set(np.asarray(drawn).tolist()) == {998, 999}


def test_without_bias_draws_are_plain_integers() -> None:
    key = jax.random.key(3)
    drawn = make_draw(TimestepBiasConfig(), TOTAL)(key, 64)
    np.testing.assert_array_equal(drawn, jax.random.randint(key, (64,), 0, TOTAL))


@pytest.mark.parametrize("strategy", [TimestepBias.earlier, TimestepBias.later])
def test_a_portion_below_one_timestep_is_one(strategy: TimestepBias) -> None:
    weights = timestep_weights(TimestepBiasConfig(strategy, multiplier=2, portion=1e-6), TOTAL)
    assert (weights > weights.min()).sum() == 1
