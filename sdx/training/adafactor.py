"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235): second moments from the means of rows and
columns, and no first moment.

As fine-tuning uses it: the learning rate is the schedule's, neither relative to the step nor to the
size of the weights, and weight decay is AdamW's.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

DECAY_EXPONENT = 0.8  # section 7.2: the second moments decay by 1 - t^-0.8
SQUARE_EPSILON = 1e-30  # algorithm 4: added to squared gradients
CLIPPING_THRESHOLD = 1.0  # section 6: root mean square of the update of one array, at most
SMALLEST_FACTORED_DIM = 128  # below, rows and columns save nothing worth the error (as in optax)


class AdafactorState(NamedTuple):
    """Second moments in float32. Each parameter has a row and a column mean or a whole array; None
    stands for what it does not have."""

    num_updates: Int[Array, ""]
    rows: Any
    columns: Any
    wholes: Any


class _Moments(NamedTuple):
    """Of one parameter."""

    row: Array | None
    column: Array | None
    whole: Array | None


def adafactor(rates: Any, *, decay: float) -> optax.GradientTransformation:
    """Adafactor at the learning rates `rates`: a schedule, or one for each network of the tree."""

    def init(params: Any) -> AdafactorState:
        leaves, structure = jax.tree.flatten(params)
        return _state(jnp.zeros((), jnp.int32), structure, [_first_moments(p) for p in leaves])

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.OptState]:
        grads, structure = jax.tree.flatten(updates)
        parts = (structure.flatten_up_to(part) for part in state[1:])
        kept = _kept(state.num_updates + 1)
        moments = [
            _next_moments(grad, _Moments(*old), kept)
            for grad, *old in zip(grads, *parts, strict=True)
        ]
        scaled = jax.tree.unflatten(
            structure, [_clip(_scale(g, m)) for g, m in zip(grads, moments, strict=True)]
        )

        def change(rate: Array, scaled: Array, param: Array) -> Array:
            return -rate * (scaled + decay * param)

        changes = jax.tree.map(  # a schedule is a leaf
            lambda rate, *trees: jax.tree.map(partial(change, rate(state.num_updates)), *trees),
            rates,
            scaled,
            params,
        )
        return changes, _state(state.num_updates + 1, structure, moments)

    return optax.GradientTransformation(init, update)


def factored_dims(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The second largest dim and the largest, where both are long enough to be averaged over.

    For a convolution these are its channels, so that each of its taps is factored by itself.
    """
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda dim: shape[dim])
    return (second, largest) if shape[second] >= SMALLEST_FACTORED_DIM else None


def _state(num_updates: Array, structure: Any, moments: list[_Moments]) -> AdafactorState:
    parts = zip(*moments, strict=True)
    return AdafactorState(num_updates, *(jax.tree.unflatten(structure, part) for part in parts))


def _first_moments(param: Array) -> _Moments:
    dims = factored_dims(param.shape)
    if dims is None:
        return _Moments(None, None, jnp.zeros(param.shape, jnp.float32))
    second, largest = dims
    return _Moments(_zeros_without(param.shape, largest), _zeros_without(param.shape, second), None)


def _zeros_without(shape: tuple[int, ...], dim: int) -> Array:
    return jnp.zeros(shape[:dim] + shape[dim + 1 :], jnp.float32)


def _kept(num_updates: Int[Array, ""]) -> Float[Array, ""]:
    """Share of the old second moments in those after so many updates; 0 at the first."""
    return 1.0 - num_updates.astype(jnp.float32) ** -DECAY_EXPONENT


def _next_moments(grad: Array, old: _Moments, kept: Array) -> _Moments:
    square = grad * grad + SQUARE_EPSILON

    def average(old: Array, new: Array) -> Array:
        return kept * old + (1 - kept) * new

    if old.whole is not None:
        return _Moments(None, None, average(old.whole, square))
    assert old.row is not None and old.column is not None
    dims = factored_dims(grad.shape)
    assert dims is not None
    second, largest = dims
    row = average(old.row, jnp.mean(square, axis=largest))
    return _Moments(row, average(old.column, jnp.mean(square, axis=second)), None)


def _scale(grad: Array, moments: _Moments) -> Array:
    """grad / sqrt(V), where V = row column / mean(row) for a factored parameter."""
    if moments.whole is not None:
        return grad * jax.lax.rsqrt(moments.whole)
    assert moments.row is not None and moments.column is not None
    dims = factored_dims(grad.shape)
    assert dims is not None
    second, largest = dims
    along = second - (second > largest)  # where `second` is in the row, which lacks `largest`
    row = moments.row / jnp.mean(moments.row, axis=along, keepdims=True)
    by_row = jnp.expand_dims(jax.lax.rsqrt(row), largest)
    return grad * by_row * jnp.expand_dims(jax.lax.rsqrt(moments.column), second)


def _clip(update: Array) -> Array:
    size = jnp.sqrt(jnp.mean(update * update))
    return update / jnp.maximum(1.0, size / CLIPPING_THRESHOLD)
