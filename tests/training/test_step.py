"""One update against torch run live, and what it does with bad examples, bad numbers and
micro-batches.

The network is a toy of two products, so that what is compared is the step and nothing else; the
real one is compared with torch where the weights are loaded.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import (
    DiffusionConfig,
    LrScheduleConfig,
    LrScheduleKind,
    OptimizerConfig,
    OptimizerKind,
    PredictionType,
    TimestepBias,
    TimestepBiasConfig,
)
from sdx.diffusion.objective import latents_and_noise, make_objective
from sdx.training import step as steps
from sdx.training.optimizer import make_lr_schedule, make_optimizer
from sdx.training.state import TrainState, initial_state, select

pytestmark = pytest.mark.fast
SIDE, CHANNELS, CONTEXT = 4, 4, 3
Batch = tuple[jax.Array, jax.Array, jax.Array]


def toy(params: Any, noisy: jax.Array, timesteps: jax.Array, context: jax.Array) -> jax.Array:
    params = params["unet"]
    shift = jnp.einsum("bsd,dk->bk", context, params["context"])
    time = jnp.sin(timesteps.astype(jnp.float32))[:, None, None, None]
    hidden = jnp.tanh(noisy @ params["first"] + shift[:, None, None, :] + time)
    return hidden @ params["second"] + params["bias"][None, None, None, :]


def toy_params() -> dict[str, Any]:
    draw = np.random.default_rng(0).normal
    shapes = {
        "first": (CHANNELS, 8),
        "context": (CONTEXT, 8),
        "second": (8, CHANNELS),
        "bias": (4,),
    }
    params = {name: 0.3 * draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"unet": jax.tree.map(jnp.asarray, params)}


def make_rule(
    kind: PredictionType = PredictionType.v_prediction,
    diffusion: DiffusionConfig | None = None,
    **changes: Any,
) -> steps.StepRule:
    lr = make_lr_schedule(
        LrScheduleConfig(kind=LrScheduleKind.linear), lr=1e-2, warmup_steps=2, decay_steps=20
    )
    options = {
        "predict": toy,
        "objective": make_objective(diffusion or DiffusionConfig(), kind),
        "scaling_factor": 0.18215,
        "optimizer": make_optimizer(OptimizerConfig(kind=OptimizerKind.adamw, lr=1e-2), lr),
        "rates": {"lr": lr},
        "max_grad_norm": 1.0,
        "ema_decay": 0.9999,
        "seed": 7,
    }
    return steps.StepRule(**(options | changes))


def make_batch(size: int = 4) -> Batch:
    draw = np.random.default_rng(1).normal
    moments = draw(size=(size, SIDE, SIDE, 2 * CHANNELS)).astype(np.float32)
    context = draw(size=(size, 5, CONTEXT)).astype(np.float32)
    return jnp.asarray(moments), jnp.asarray(context), jnp.ones(size)


def start(rule: steps.StepRule, *, ema: bool = True) -> TrainState:
    return initial_state(toy_params(), rule.optimizer, ema=ema)


def jitted(rule: steps.StepRule) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    return jax.jit(lambda *args: steps.train_step(rule, *args))


@pytest.mark.parametrize("kind", [PredictionType.epsilon, PredictionType.v_prediction])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_five_steps_are_torchs(kind: PredictionType, snr_gamma: float | None) -> None:
    """Loss, gradient norm, AdamW, clipping, the learning rate and EMA, as diffusers' script orders
    them."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    rule, batch = make_rule(kind, DiffusionConfig(snr_gamma=snr_gamma)), make_batch()
    state = start(rule)
    theirs = {
        name: torch.nn.Parameter(torch.tensor(np.array(value)))
        for name, value in state.params["unet"].items()
    }
    parameters = list(theirs.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    schedule = diffusers.optimization.get_scheduler(
        "linear", optimizer, num_warmup_steps=2, num_training_steps=20
    )
    ema = diffusers.training_utils.EMAModel(parameters)
    for _ in range(5):
        examples = steps.draw_examples(rule, state.step, *batch)
        loss = torch_loss(theirs, rule, examples, kind, snr_gamma)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(parameters)
        state, metrics = jitted(rule)(state, *batch)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-6)
        assert float(metrics["lr"]) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
    assert state.ema is not None
    for (name, ours), shadow in zip(state.params["unet"].items(), ema.shadow_params, strict=True):
        assert_close(ours, theirs[name])
        assert_close(state.ema["unet"][name], shadow)


def torch_loss(
    params: Any, rule: steps.StepRule, examples: steps.Examples, kind: PredictionType, gamma: Any
) -> Any:
    torch = pytest.importorskip("torch")
    noisy, target, context = (
        torch.tensor(np.array(x)) for x in (examples.noisy, examples.target, examples.conditioning)
    )
    timesteps = np.array(examples.timesteps)
    shift = torch.einsum("bsd,dk->bk", context, params["context"])[:, None, None]
    time = torch.sin(torch.tensor(timesteps, dtype=torch.float32))[:, None, None, None]
    hidden = torch.tanh(noisy @ params["first"] + shift + time)
    prediction = hidden @ params["second"] + params["bias"]
    if gamma is None:
        return torch.nn.functional.mse_loss(prediction, target)
    table = torch.tensor(rule.objective.schedule.alphas_cumprod)[timesteps]
    snr = table / (1 - table)
    weights = torch.clamp(snr, max=gamma) / (snr if kind is PredictionType.epsilon else snr + 1)
    return (((prediction - target) ** 2).mean(dim=(1, 2, 3)) * weights).mean()


def assert_close(ours: jax.Array, theirs: Any) -> None:
    reference = theirs.detach().numpy()
    difference = np.linalg.norm(np.asarray(ours) - reference)
    assert difference <= 1e-6 * np.linalg.norm(reference)


@pytest.mark.parametrize(
    ("pieces", "unroll", "dream"), [(2, True, 1.0), (2, False, None), (4, True, None)]
)
def test_micro_batches_equal_the_large_batch(
    pieces: int, unroll: bool, dream: float | None
) -> None:
    batch = make_batch()
    weights = jnp.array([1.0, 0.0, 1.0, 1.0])
    objective = PredictionType.epsilon, DiffusionConfig(dream=dream)
    whole = make_rule(*objective)
    split = make_rule(*objective, gradient_accumulation=pieces, unroll=unroll)
    expected, expected_metrics = jitted(whole)(start(whole), *batch[:2], weights)
    state, metrics = jitted(split)(start(split), *batch[:2], weights)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state, expected
    )


def test_an_example_of_weight_zero_changes_nothing() -> None:
    rule, (moments, context, _) = make_rule(), make_batch()
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])
    drawn = steps.draw_examples(rule, jnp.int32(0), moments, context, weights)
    np.testing.assert_allclose(drawn.weights, [1 / 3, 1 / 3, 1 / 3, 0])  # a mean over good ones
    spoiled = moments.at[3].set(1e3)
    state, metrics = jitted(rule)(start(rule), moments, context, weights)
    other, other_metrics = jitted(rule)(start(rule), spoiled, context, weights)
    assert metrics["loss"] == other_metrics["loss"]
    jax.tree.map(np.testing.assert_array_equal, state, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_leaves_everything_but_the_counters(bad: float) -> None:
    rule, batch = make_rule(), make_batch()
    step = jitted(rule)
    before, _ = step(start(rule), *batch)
    spoiled = batch[0].at[0, 0, 0, 0].set(bad)
    after, metrics = step(before, spoiled, *batch[1:])
    for name in ("params", "ema", "opt_state", "num_updates"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert (int(after.step), int(after.num_bad_steps), int(after.bad_in_a_row)) == (2, 1, 1)
    assert metrics["bad"] == 1 and metrics["bad_in_a_row"] == 1
    again, _ = step(after, spoiled, *batch[1:])
    assert int(again.bad_in_a_row) == 2
    good, metrics = step(again, *batch)
    assert (int(good.step), int(good.num_updates), int(good.bad_in_a_row)) == (4, 2, 0)
    assert int(good.num_bad_steps) == 2 and metrics["bad"] == 0


def test_infinite_gradients_of_a_finite_loss_are_bad_too() -> None:
    def steep(params: Any, noisy: jax.Array, *_: jax.Array) -> jax.Array:
        return noisy * jnp.sqrt(jnp.sum(jnp.square(params["unet"]["bias"] * 0)))  # gradient 0 / 0

    rule = make_rule(predict=steep)
    state, metrics = jitted(rule)(start(rule), *make_batch())
    assert np.isfinite(metrics["loss"]) and metrics["bad"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, toy_params())


def test_randomness_is_a_function_of_seed_and_step() -> None:
    rule, batch = make_rule(), make_batch()
    first = steps.draw_examples(rule, jnp.int32(3), *batch)
    jax.tree.map(
        np.testing.assert_array_equal, first, steps.draw_examples(rule, jnp.int32(3), *batch)
    )
    for other_rule, step in ((rule, 4), (replace(rule, seed=8), 3)):
        other = steps.draw_examples(other_rule, jnp.int32(step), *batch)
        assert not np.array_equal(first.noisy, other.noisy)
        assert not np.array_equal(first.timesteps, other.timesteps)
    key = steps.step_key(7, jnp.int32(3))
    streams = {str(jax.random.key_data(steps.stream(key, name))) for name in steps.STREAMS}
    assert len(streams) == len(steps.STREAMS)
    assert steps.STREAMS[:3] == ("noise", "timesteps", "latents")  # or every run draws anew


def test_draws_have_the_moments_they_should() -> None:
    size = 4096
    moments = jnp.concatenate(
        [jnp.full((size, 1, 1, 4), 3.0), jnp.full((size, 1, 1, 4), 2 * np.log(0.5))], axis=-1
    )
    latents = steps.sample_latents(jax.random.key(0), moments)
    assert float(latents.mean()) == pytest.approx(3, abs=0.02)
    assert float(latents.std()) == pytest.approx(0.5, abs=0.02)
    rule = make_rule()
    drawn = steps.draw_examples(
        rule, jnp.int32(0), moments, jnp.zeros((size, 1, CONTEXT)), jnp.ones(size)
    )
    counts = np.bincount(np.array(drawn.timesteps) // 100, minlength=10)
    expected = size / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees, 0.1 %
    assert drawn.timesteps.min() >= 0 and drawn.timesteps.max() <= 999


@pytest.mark.parametrize("kind", PredictionType)
def test_latents_are_scaled_and_noised_as_the_target_says(kind: PredictionType) -> None:
    rule = make_rule(kind)
    moments, context, weights = make_batch()
    mean, _ = jnp.split(moments, 2, axis=-1)
    certain = jnp.concatenate([mean, jnp.full_like(mean, -100.0)], axis=-1)  # clipped to -30
    drawn = steps.draw_examples(rule, jnp.int32(2), certain, context, weights)
    signal, sigma = rule.objective.schedule.coefficients(drawn.timesteps)
    latents, noise = latents_and_noise(kind, drawn.target, drawn.noisy, signal=signal, sigma=sigma)
    np.testing.assert_allclose(latents, 0.18215 * mean, atol=1e-4)
    expected = jax.random.normal(steps.stream(steps.step_key(7, jnp.int32(2)), "noise"), mean.shape)
    np.testing.assert_allclose(noise, expected, atol=1e-3)


@pytest.mark.parametrize("kind", [PredictionType.epsilon, PredictionType.v_prediction])
def test_offset_and_perturbation_are_diffusers(kind: PredictionType) -> None:
    """train_text_to_image.py: the offset is part of the noise, the perturbation only of the
    input."""
    rule = make_rule(kind, DiffusionConfig(noise_offset=0.1, input_perturbation=0.2))
    plain = make_rule(kind)
    batch, step = make_batch(), jnp.int32(2)
    drawn, before = (steps.draw_examples(r, step, *batch) for r in (rule, plain))
    np.testing.assert_array_equal(drawn.timesteps, before.timesteps)
    key = steps.step_key(7, step)
    normal = {
        name: jax.random.normal(steps.stream(key, name), shape)
        for name, shape in {
            "noise": before.noisy.shape,
            "noise_offset": (4, 1, 1, CHANNELS),
            "input_perturbation": before.noisy.shape,
        }.items()
    }
    latents = 0.18215 * steps.sample_latents(steps.stream(key, "latents"), batch[0])
    noise = normal["noise"] + 0.1 * normal["noise_offset"]
    signal, sigma = rule.objective.schedule.coefficients(drawn.timesteps)
    expected = noise if kind is PredictionType.epsilon else signal * noise - sigma * latents
    noisy = signal * latents + sigma * (noise + 0.2 * normal["input_perturbation"])
    np.testing.assert_allclose(drawn.target, expected, atol=1e-6)
    np.testing.assert_allclose(drawn.noisy, noisy, atol=1e-6)
    shift = drawn.target - before.target
    if kind is PredictionType.epsilon:  # one number for each example and channel
        np.testing.assert_allclose(
            shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-6
        )


def test_no_gradient_flows_through_dreams_first_look() -> None:
    rule = make_rule(PredictionType.epsilon, DiffusionConfig(dream=1.0))
    params, examples = toy_params(), steps.draw_examples(rule, jnp.int32(0), *make_batch())
    guess = rule.predict(params, examples.noisy, examples.timesteps, examples.conditioning)
    _, sigma = rule.objective.schedule.coefficients(examples.timesteps)
    error = sigma * (examples.target - guess)
    fixed = examples._replace(noisy=examples.noisy + sigma * error, target=examples.target + error)
    loss, grads = steps.loss_and_grads(rule, params, examples)
    expected = steps.loss_and_grads(make_rule(PredictionType.epsilon), params, fixed)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, expected[1]
    )
    assert float(loss) != float(steps.loss_and_grads(make_rule(), params, examples)[0])


def test_biased_timesteps_are_drawn_for_the_whole_batch() -> None:
    bias = TimestepBiasConfig(TimestepBias.range, multiplier=1e9, begin=40, end=41)
    drawn = steps.draw_examples(
        make_rule(diffusion=DiffusionConfig(timestep_bias=bias)), jnp.int32(0), *make_batch(64)
    )
    assert set(np.asarray(drawn.timesteps).tolist()) == {40, 41}


def test_overfits_one_batch_and_says_the_same_twice() -> None:
    lr = make_lr_schedule(
        LrScheduleConfig(kind=LrScheduleKind.constant), lr=3e-2, warmup_steps=0, decay_steps=1
    )
    optimizer = make_optimizer(OptimizerConfig(kind=OptimizerKind.adamw, lr=3e-2), lr)
    rule, batch = make_rule(optimizer=optimizer, rates={"lr": lr}), make_batch(16)
    losses = [run_losses(rule, batch, 150) for _ in range(2)]
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-20:]) < 0.5 * np.mean(losses[0][:5])


def run_losses(rule: steps.StepRule, batch: Batch, num_steps: int) -> list[float]:
    state, step = start(rule), jitted(rule)
    losses = []
    for _ in range(num_steps):
        state, metrics = step(state, *batch)
        losses.append(float(metrics["loss"]))
    return losses


def test_without_ema_there_is_none() -> None:
    rule = make_rule()
    state, _ = jitted(rule)(start(rule, ema=False), *make_batch())
    assert state.ema is None


def test_weights_stored_in_bfloat16_stay_so() -> None:
    rule = make_rule()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy_params())

    def predict(params: Any, *args: jax.Array) -> jax.Array:
        return toy(jax.tree.map(lambda x: x.astype(jnp.float32), params), *args)

    rule = make_rule(predict=predict)
    before = initial_state(params, rule.optimizer, ema=True)
    after, metrics = jitted(rule)(before, *make_batch())
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
    assert metrics["bad"] == 0


def test_a_change_below_a_512th_of_a_bfloat16_weight_is_lost() -> None:
    """What a run with such weights is told of, and why float32 is the default."""
    weights = jnp.asarray(np.linspace(1, 2, 64, endpoint=False), jnp.bfloat16)
    lost, kept = (
        select(jnp.bool_(True), weights.astype(jnp.float32) * (1 + share), weights)
        for share in (0.99 / 512, 1.01 / 256)
    )
    np.testing.assert_array_equal(lost, weights)
    assert bool((kept != weights).all())
