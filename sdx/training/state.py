"""Everything a run carries from one step to the next, and all that a checkpoint holds."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

Params = dict[str, Any]
Counter = Any  # an int32 scalar; in trees of shapes or shardings, that


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A plain pytree. `params` and `ema` are `{"unet": ...}`, with "text_encoder" where that is
    trained; `ema` is None when switched off."""

    step: Counter
    """Update attempts made; also the position in the data and in the random streams."""
    num_updates: Counter
    """Attempts that changed the weights; what schedules and EMA count."""
    num_bad_steps: Counter
    """Attempts skipped because loss or gradient was not finite."""
    bad_in_a_row: Counter
    params: Params
    ema: Params | None
    opt_state: optax.OptState


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """The state before the first step; the average starts as a copy of the weights."""
    zeros = [jnp.zeros((), jnp.int32) for _ in range(4)]
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(*zeros, params=params, ema=average, opt_state=optimizer.init(params))


def sampling_params(state: TrainState) -> Params:
    """The weights pictures are drawn with: the average, or the weights themselves where there is
    none."""
    return state.params if state.ema is None else state.ema


def select(is_good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the update was good, else `old`, leaf by leaf and stored in the type of `old`."""
    return jax.tree.map(lambda a, b: jax.lax.select(is_good, a.astype(b.dtype), b), new, old)
