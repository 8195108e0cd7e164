"""One update attempt: noise the latents, predict, differentiate, clip, update, average. Pure;
program.py compiles it.

Randomness is drawn at global shape from (seed, step) and a named stream before the batch is split,
so it depends neither on the mesh nor on accumulation. A non-finite loss or gradient leaves weights,
moments and average as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from sdx.diffusion.objective import Objective
from sdx.training.optimizer import LrSchedule, clip, ema_decay
from sdx.training.state import Params, TrainState, select

# A name's place is its number: further ones are appended, or every run draws anew.
STREAMS = ("noise", "timesteps", "latents", "noise_offset", "input_perturbation")
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution

Conditioning = Float[Array, "b s d"] | Int[Array, "b s"]
"""What the UNet is told of the caption: text states, or token ids where the text encoder is trained
and so part of the prediction."""

Prediction = Callable[
    [Params, Float[Array, "b h w c"], Int[Array, " b"], Conditioning], Float[Array, "b h w c"]
]
"""What is trained as a function of all its parameters: (params, noisy latents, timesteps,
conditioning) to the UNet's raw output."""


@dataclass(frozen=True)
class StepRule:
    """What a step is made of, fixed when the program is built."""

    predict: Prediction
    objective: Objective
    scaling_factor: float
    optimizer: optax.GradientTransformation
    rates: Mapping[str, LrSchedule]
    """Learning rates that the optimizer uses, by the name of their metric."""
    max_grad_norm: float | None
    ema_decay: float
    seed: int
    gradient_accumulation: int = 1
    unroll: bool = True
    """Micro-steps one after the other in the program; false scans. XLA's CPU kernels are 6 times
    slower in a loop."""


class Examples(NamedTuple):
    """What the loss is computed on, per example, the randomness included."""

    noisy: Float[Array, "b h w c"]
    target: Float[Array, "b h w c"]
    timesteps: Int[Array, " b"]
    conditioning: Conditioning
    weights: Float[Array, " b"]
    """Share of each example in the loss; they sum to 1 without Min-SNR."""


def train_step(
    rule: StepRule,
    state: TrainState,
    moments: Float[Array, "b h w m"],
    conditioning: Conditioning,
    weights: Float[Array, " b"],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one attempt, and its metrics; `weights` are 1 for good examples, 0 for
    unreadable ones.

    Metrics: as `update`.
    """
    return update(rule, state, draw_examples(rule, state.step, moments, conditioning, weights))


def update(
    rule: StepRule, state: TrainState, examples: Examples
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The state after one attempt to learn from `examples`, and its metrics; draws nothing.

    Metrics: loss, grad_norm (before clipping), the rates of the next update, bad, num_bad_steps,
    bad_in_a_row.
    """
    loss, grads = loss_and_grads(rule, state.params, examples)
    norm = optax.tree.norm(_float32(grads))
    is_good = jnp.isfinite(loss) & jnp.isfinite(norm)
    updated = _apply(rule, state, grads, norm)
    kept = select(is_good, updated, state)
    bad = jnp.int32(1) - is_good.astype(jnp.int32)
    state = replace(
        kept,
        step=state.step + 1,
        num_bad_steps=state.num_bad_steps + bad,
        bad_in_a_row=(state.bad_in_a_row + bad) * bad,
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        **{name: rate(state.num_updates) for name, rate in rule.rates.items()},
        "bad": bad,
        "num_bad_steps": state.num_bad_steps,
        "bad_in_a_row": state.bad_in_a_row,
    }
    return state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def step_key(seed: int, step: Int[Array, ""]) -> Key[Array, ""]:
    """The key of one step; every use takes its own stream of it."""
    return jax.random.fold_in(jax.random.key(seed), step)


def stream(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The key of the named stream."""
    return jax.random.fold_in(key, STREAMS.index(name))


def draw_examples(
    rule: StepRule,
    step: Int[Array, ""],
    moments: Float[Array, "b h w m"],
    conditioning: Conditioning,
    weights: Float[Array, " b"],
) -> Examples:
    """Sample latents from `moments`, then noise and timesteps, for the whole batch at once."""
    streams, objective = partial(stream, step_key(rule.seed, step)), rule.objective
    latents = sample_latents(streams("latents"), moments) * rule.scaling_factor
    noise = objective.draw_noise(streams, latents.shape)
    timesteps = objective.draw_timesteps(streams("timesteps"), len(weights))
    shares = weights / jnp.maximum(jnp.sum(weights), 1.0)
    return Examples(
        noisy=objective.schedule.add_noise(latents, objective.perturb(streams, noise), timesteps),
        target=objective.target(latents, noise, timesteps),
        timesteps=timesteps,
        conditioning=conditioning,
        weights=objective.weigh(shares, timesteps),
    )


def sample_latents(
    key: Key[Array, ""], moments: Float[Array, "b h w m"]
) -> Float[Array, "b h w c"]:
    """A draw from the VAE's posterior, whose mean and log-variance `moments` holds; float32, not
    yet scaled."""
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    deviation = jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE_RANGE))
    return mean + deviation * jax.random.normal(key, mean.shape)


def loss_and_grads(
    rule: StepRule, params: Params, examples: Examples
) -> tuple[Float[Array, ""], Params]:
    """The weighted mean squared error and its gradient, summed over micro-batches; float32."""
    gradient = jax.value_and_grad(batch_loss, argnums=1)
    if rule.gradient_accumulation == 1:
        return gradient(rule, params, examples)
    pieces = jax.tree.map(lambda x: split_batch(x, rule.gradient_accumulation), examples)

    def add(total: Any, piece: Examples) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(rule, params, piece)), None

    total = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    if not rule.unroll:
        return jax.lax.scan(add, total, pieces)[0]
    for index in range(rule.gradient_accumulation):
        total, _ = add(total, jax.tree.map(lambda x, i=index: x[i], pieces))
    return total


def split_batch(x: Array, num_pieces: int) -> Array:
    """(b, ...) to (pieces, b / pieces, ...), each piece with an equal part of every device's share
    of the batch."""
    return jnp.moveaxis(x.reshape(x.shape[0] // num_pieces, num_pieces, *x.shape[1:]), 1, 0)


def batch_loss(rule: StepRule, params: Params, examples: Examples) -> Float[Array, ""]:
    """Sum over examples of weight times mean squared error; float32."""
    timesteps = examples.timesteps

    def predict(params: Params, noisy: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        prediction = rule.predict(params, noisy, timesteps, examples.conditioning)
        return prediction.astype(jnp.float32)

    as_it_is = partial(predict, jax.lax.stop_gradient(params))
    noisy, target = rule.objective.rectify(as_it_is, examples.noisy, examples.target, timesteps)
    errors = jnp.mean(jnp.square(predict(params, noisy) - target), axis=(1, 2, 3))
    return jnp.sum(examples.weights * errors)


def _apply(rule: StepRule, state: TrainState, grads: Params, norm: Float[Array, ""]) -> TrainState:
    """The state after a good update; in float32 whatever the weights are stored in."""
    params, ema, opt_state, grads = _float32((state.params, state.ema, state.opt_state, grads))
    if rule.max_grad_norm is not None:
        grads = clip(grads, norm, rule.max_grad_norm)
    updates, opt_state = rule.optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    if ema is not None:
        share = 1 - ema_decay(state.num_updates, rule.ema_decay)
        ema = jax.tree.map(lambda average, new: average - share * (average - new), ema, params)
    num_updates = state.num_updates + 1
    return replace(state, num_updates=num_updates, params=params, ema=ema, opt_state=opt_state)


def _float32(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
