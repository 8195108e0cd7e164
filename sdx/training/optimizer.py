"""How weights are updated: AdamW, Lion, clipping, learning-rate schedules and the moving average of
the weights; Adafactor lies in adafactor.py.

Schedules and EMA equal diffusers' (optimization.py, training_utils.EMAModel), AdamW and clipping
equal torch's. All are functions of the number of updates made, which a skipped step does not
advance.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdx.config.schema import LrScheduleConfig, LrScheduleKind, OptimizerConfig, OptimizerKind
from sdx.training.adafactor import adafactor

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6

LrSchedule = Callable[[Int[Array, ""]], Float[Array, ""]]
Rates = LrSchedule | Mapping[str, LrSchedule]
"""One schedule for all parameters, or one for each network of the tree."""


def make_optimizer(optimizer: OptimizerConfig, rates: Rates) -> optax.GradientTransformation:
    """The update rule of `optimizer` without clipping, which the step does: it has the norm."""
    b1, b2, decay = optimizer.b1, optimizer.b2, optimizer.weight_decay
    match optimizer.kind:
        case OptimizerKind.adamw:
            return adamw(rates, b1, b2, eps=optimizer.eps, decay=decay)
        case OptimizerKind.adafactor:
            return adafactor(rates, decay=decay)
        case OptimizerKind.lion:
            return lion(rates, b1, b2, decay=decay)
    assert_never(optimizer.kind)


def adamw(
    rates: Rates, b1: float, b2: float, *, eps: float, decay: float
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), decay on every parameter.

    Not `optax.adamw`: its `1 - b2**count` in float32 is 1e-5 off at the first steps, which shows in
    the weights, and it traces five passes over the tree where this traces three.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.OptState]:
        count = state.count + 1
        correct1, correct2 = _bias_correction(b1, count), _bias_correction(b2, count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g * g, state.nu, updates)

        def change(rate: Array, m: Array, n: Array, p: Array) -> Array:
            return -rate * (m / correct1 / (jnp.sqrt(n / correct2) + eps) + decay * p)

        def change_all(rate: LrSchedule, *trees: Any) -> Any:
            return jax.tree.map(partial(change, rate(state.count)), *trees)

        changes = jax.tree.map(change_all, rates, mu, nu, params)  # a schedule is a leaf
        return changes, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def lion(rates: Rates, b1: float, b2: float, *, decay: float) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of what momentum and
    gradient make, so that every weight moves by the whole rate; decay on every parameter.

    Not `optax.lion`, which takes one rate for all networks and traces more passes over the tree.
    """

    def init(params: Any) -> optax.ScaleByLionState:
        return optax.ScaleByLionState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.OptState]:
        def change(rate: Array, m: Array, g: Array, p: Array) -> Array:
            return -rate * (jnp.sign(b1 * m + (1 - b1) * g) + decay * p)

        def change_all(rate: LrSchedule, *trees: Any) -> Any:
            return jax.tree.map(partial(change, rate(state.count)), *trees)

        changes = jax.tree.map(change_all, rates, state.mu, updates, params)
        mu = jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g, state.mu, updates)
        return changes, optax.ScaleByLionState(state.count + 1, mu)

    return optax.GradientTransformation(init, update)


def make_lr_schedule(
    schedule: LrScheduleConfig, *, lr: float, warmup_steps: int, decay_steps: int
) -> LrSchedule:
    """Learning rate of an update from the number of updates before it.

    Warm-up is linear from 0. Past `decay_steps` a decaying schedule stays at its end; diffusers'
    cosine would rise again.
    """
    span = max(1, decay_steps - warmup_steps)
    end = schedule.end_lr / lr

    def warmup(count: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.minimum(_ratio(count, max(1, warmup_steps)), 1.0)

    def decay(count: Int[Array, ""]) -> Float[Array, ""]:
        """Shape after the warm-up, of the steps since then."""
        match schedule.kind:
            case LrScheduleKind.linear:
                return _ratio(span - count, span)
            case LrScheduleKind.cosine:
                return _half_cosine(_ratio(count, span))
            case LrScheduleKind.cosine_with_restarts:
                # in integers: rounding must not decide on which side of a restart a step lies
                within = _ratio(jax.lax.rem(schedule.num_cycles * count, jnp.int32(span)), span)
                return jnp.where(count >= span, 0.0, _half_cosine(within))
            case LrScheduleKind.polynomial:
                return (1 - end) * _ratio(span - count, span) ** schedule.power + end
            case LrScheduleKind.constant | LrScheduleKind.constant_with_warmup:
                return jnp.float32(1)
        assert_never(schedule.kind)

    def rate(count: Int[Array, ""]) -> Float[Array, ""]:
        after = jnp.clip(count - warmup_steps, 0, span)
        return lr * jnp.where(count < warmup_steps, warmup(count), decay(after))

    if schedule.kind is LrScheduleKind.constant:
        return lambda count: jnp.full_like(count, lr, dtype=jnp.float32)
    return rate


def scaled(schedule: LrSchedule, share: float) -> LrSchedule:
    """That share of the rate of `schedule`, as diffusers' schedulers treat parameter groups."""
    return lambda count: share * schedule(count)


def clip(grads: Any, norm: Float[Array, ""], max_norm: float) -> Any:
    """`grads`, whose global norm is `norm`, scaled down to at most `max_norm`."""
    scale = jnp.minimum(max_norm / (norm + CLIP_EPSILON), 1.0)
    return jax.tree.map(lambda grad: grad * scale, grads)


def ema_decay(num_updates: Int[Array, ""], cap: float) -> Float[Array, ""]:
    """Decay of the average at the update after `num_updates`: 0 at the first, then (1 + s) / (10 +
    s) up to `cap`."""
    count = num_updates.astype(jnp.float32)
    return jnp.where(num_updates == 0, 0.0, jnp.minimum((1 + count) / (10 + count), cap))


def _bias_correction(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """1 - decay^count without cancellation."""
    log = math.log(decay) if decay else -math.inf
    return -jnp.expm1(count.astype(jnp.float32) * log)


def _ratio(part: Int[Array, ""], whole: int) -> Float[Array, ""]:
    return part.astype(jnp.float32) / whole


def _half_cosine(progress: Float[Array, ""]) -> Float[Array, ""]:
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))
