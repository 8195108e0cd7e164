"""`optimizer.*`, `lr_schedule.*` and what of `train.*` an update is made of.

The update is the program's own rule around a network of one weight, 1, whose prediction is that
weight; the target is 0, so that the loss is 1 and the gradient 2.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from pytest import approx

from sdx.training.state import TrainState, initial_state
from sdx.training.step import Examples, update
from tests.effects.effect import Case, Effect
from tests.effects.tracing import Observer

GRADIENT = 2.0


def updated(case: Case, num_updates: int = 1) -> TrainState:
    """The state after so many updates of the one weight."""
    program = case.program
    weights = {name: {"w": jnp.ones(1)} for name in program.abstract_state.params}

    def predict(params: Any, noisy: Any, timesteps: Any, conditioning: Any) -> Any:
        own = sum(params[name]["w"] for name in params) / len(params)
        return jnp.broadcast_to(own, noisy.shape)

    rule = replace(program.rule, predict=predict)
    pixel = jnp.zeros((1, 1, 1, 1))
    examples = Examples(pixel, pixel, jnp.zeros(1, jnp.int32), jnp.zeros((1, 1, 1)), jnp.ones(1))
    state = initial_state(weights, rule.optimizer, ema=case.config.train.ema)
    for _ in range(num_updates):
        state, _ = update(rule, state, examples)
    return state


def change(case: Case) -> float:
    """Of the weight in one update, in learning rates."""
    return (weight(updated(case).params) - 1) / case.config.optimizer.lr


def step_size(network: str) -> Observer:
    """How far the weight of a network moves in one update."""
    return lambda case: 1 - weight(updated(case).params, network)


def moments(case: Case) -> tuple[float, float]:
    """First and second, after one update."""
    state: Any = updated(case).opt_state
    return weight(state.mu), weight(state.nu)


def average(case: Case) -> float | None:
    """Of the weight at the updates up to the third, as shares: its distance from the third over
    that between second and third."""
    second, third = updated(case, 2), updated(case, 3)
    if third.ema is None:
        return None
    assert second.ema is not None
    return (weight(third.ema) - weight(third.params)) / (weight(second.ema) - weight(third.params))


def rates(*counts: int) -> Observer:
    """The learning rate of the updates after so many, over the peak."""

    def observe(case: Case) -> list[float]:
        rate, peak = case.program.rule.rates["lr"], case.config.optimizer.lr
        return [float(rate(jnp.int32(count))) / peak for count in counts]

    return observe


def weight(params: Any, network: str = "unet") -> float:
    return float(np.asarray(params[network]["w"])[0])


def near(first: float, *others: float) -> Any:
    """Numbers as float32 holds them."""
    return approx([first, *others] if others else first, rel=1e-4, abs=1e-6)


CLIP_OFF = ("optimizer.max_grad_norm=null",)

EFFECTS = [
    Effect("optimizer.lr", "2e-3", step_size("unet"), near(1.01e-3), near(2.02e-3)),
    Effect(
        "optimizer.b1",
        "0.5",
        lambda case: moments(case)[0],
        near(0.1 * GRADIENT),
        near(0.5 * GRADIENT),
        given=CLIP_OFF,
    ),
    Effect(
        "optimizer.b2",
        "0.5",
        lambda case: moments(case)[1],
        near(0.001 * GRADIENT**2),
        near(0.5 * GRADIENT**2),
        given=CLIP_OFF,
    ),
    Effect(
        "optimizer.eps",
        "2.0",
        change,
        near(-1.01),
        near(-0.51),  # g / (|g| + eps), and the decay
        given=CLIP_OFF,
    ),
    Effect("optimizer.weight_decay", "0.5", change, near(-1.01), near(-1.5)),
    Effect(
        "optimizer.max_grad_norm",
        "1e-3",
        lambda case: moments(case)[0],
        near(0.1),
        near(1e-4),
    ),
    Effect(
        "optimizer.text_encoder_lr",
        "5e-4",
        step_size("text_encoder"),
        near(1.01e-3),
        near(5.05e-4),
        given=("train.text_encoder=true",),
    ),
    Effect("optimizer.scale_lr", "true", rates(0), [near(1)], [near(4)]),  # a batch of 4
    Effect("lr_schedule.kind", "linear", rates(0, 5), near(1, 1), near(1, 0.5)),
    Effect(
        "lr_schedule.warmup_steps",
        "4",
        rates(0, 1, 2, 4),
        near(1, 0.9, 0.8, 0.6),
        near(0, 0.25, 0.5, 1),
        given=("lr_schedule=linear",),
    ),
    Effect(
        "lr_schedule.warmup_fraction",
        "0.4",
        rates(0, 1, 2, 4),
        near(1, 0.9, 0.8, 0.6),
        near(0, 0.25, 0.5, 1),
        given=("lr_schedule=linear",),
    ),
    Effect(
        "lr_schedule.decay_steps",
        "20",
        rates(5, 10),
        near(0.5, 0),
        near(0.75, 0.5),
        given=("lr_schedule=linear",),
    ),
    Effect(
        "lr_schedule.num_cycles",
        "2",
        rates(0, 5, 6),
        near(1, 0.5, 0.345492),
        near(1, 1, 0.904508),
        given=("lr_schedule=cosine_with_restarts",),
    ),
    Effect(
        "lr_schedule.power",
        "2",
        rates(5),
        [near(0.50005)],  # of the way from lr to end_lr, 1e-4 of it
        [near(0.250075)],
        given=("lr_schedule=polynomial",),
    ),
    Effect(
        "lr_schedule.end_lr",
        "5e-4",
        rates(10),
        [near(1e-4)],
        [near(0.5)],
        given=("lr_schedule=polynomial",),
    ),
    Effect("train.ema", "false", lambda case: updated(case).ema is None, False, True),
    Effect(
        "train.ema_decay",
        "0.1",
        average,
        near(3 / 12),  # diffusers' (1 + s) / (10 + s), of the third update
        near(0.1),
    ),
    Effect(
        "train.text_encoder",
        "true",
        lambda case: sorted(case.program.abstract_state.params),
        ["unet"],
        ["text_encoder", "unet"],
    ),
]
