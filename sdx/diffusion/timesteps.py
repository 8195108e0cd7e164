"""Which timesteps are trained: evenly drawn, or some of them more often.

The weights are those of diffusers' train_text_to_image_sdxl.py (`generate_timestep_weights`), but
`range` includes its end, as its help says there.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdx.config.schema import TimestepBias, TimestepBiasConfig

DrawTimesteps = Callable[[Key[Array, ""], int], Int[Array, " b"]]
"""(key, number of examples) to their timesteps."""


def make_draw(bias: TimestepBiasConfig, num_timesteps: int) -> DrawTimesteps:
    """How timesteps 0 to `num_timesteps`, exclusive, are drawn."""
    if bias.strategy is TimestepBias.none:
        return lambda key, count: jax.random.randint(key, (count,), 0, num_timesteps)
    return _draw_by(timestep_weights(bias, num_timesteps))


def timestep_weights(bias: TimestepBiasConfig, num_timesteps: int) -> Float[np.ndarray, " t"]:
    """Probability of each timestep; float64."""
    weights = np.ones(num_timesteps)
    weights[_biased(bias, num_timesteps)] = bias.multiplier
    return weights / weights.sum()


def _biased(bias: TimestepBiasConfig, num_timesteps: int) -> slice:
    count = max(1, int(bias.portion * num_timesteps))
    return {
        TimestepBias.none: slice(0),
        TimestepBias.earlier: slice(count),
        TimestepBias.later: slice(num_timesteps - count, None),
        TimestepBias.range: slice(bias.begin, bias.end + 1),
    }[bias.strategy]


def _draw_by(weights: Float[np.ndarray, " t"]) -> DrawTimesteps:
    """By the inverse of the distribution function: one even draw an example, whatever the table."""
    ends = np.cumsum(weights)[:-1].astype(np.float32)

    def draw(key: Key[Array, ""], count: int) -> Int[Array, " b"]:
        even = jax.random.uniform(key, (count, 1))
        return jnp.sum(even >= ends[None], axis=1, dtype=jnp.int32)

    return draw
