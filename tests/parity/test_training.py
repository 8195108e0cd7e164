"""Gradients and updates of real UNets against torch run live.

sdx draws; what it drew is handed to diffusers' own noise schedule, loss, AdamW, clipping and
average.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdx.config.schema import (
    DiffusionConfig,
    LrScheduleConfig,
    LrScheduleKind,
    OptimizerConfig,
    OptimizerKind,
    PredictionType,
)
from sdx.diffusion.objective import make_objective
from sdx.models.module import flat
from sdx.training import step as steps
from sdx.training.program import Program, build
from sdx.training.state import Params
from sdx.weights.load import load_unet
from sdx.weights.names import array_to_torch, to_torch
from tests.micro import BATCH_SIZE, micro_config, micro_mesh
from tests.parity.sides import nchw, normal, quickly, script_loss
from tests.weights.conftest import NUM_TOKENS, Reference, make_reference

GRADIENT_RTOL, COSINE = 1e-4, 0.99999
UPDATE_RTOL = 1e-6
DEEP_SIDE = 16  # two pixels on the lowest level: one alone has no attention to learn
LR, WARMUP_STEPS, DECAY_STEPS = 1e-3, 2, 20
Batch = tuple[jax.Array, jax.Array, jax.Array]


def make_program(model: Reference, kind: PredictionType, snr_gamma: float | None) -> Program:
    config = replace(
        micro_config(),
        model=replace(model.model, prediction_type=kind),
        diffusion=DiffusionConfig(snr_gamma=snr_gamma),
        optimizer=OptimizerConfig(kind=OptimizerKind.adamw, lr=LR),
        lr_schedule=LrScheduleConfig(
            kind=LrScheduleKind.linear, warmup_steps=WARMUP_STEPS, decay_steps=DECAY_STEPS
        ),
    )
    return build(config, micro_mesh(), max_steps=DECAY_STEPS)


def make_batch(seed: int, side: int = 8) -> Batch:
    """Moments as wide as real ones are (deviation 5, nearly certain), text states, full weights."""
    mean = 5 * normal(seed, BATCH_SIZE, side, side, 4)
    moments = np.concatenate([mean, np.full_like(mean, -6)], axis=-1)
    context = normal(seed + 1, BATCH_SIZE, NUM_TOKENS, 24)
    return jnp.asarray(moments), jnp.asarray(context), jnp.ones(BATCH_SIZE)


def drawn(
    rule: steps.StepRule, step: int, batch: Batch, timesteps: jax.Array
) -> tuple[torch.Tensor, ...]:
    """What sdx draws at `step`, for torch: scaled latents, noise, timesteps, text states."""
    moments, context, _ = batch
    key = steps.step_key(rule.seed, jnp.int32(step))
    latents = steps.sample_latents(steps.stream(key, "latents"), moments) * rule.scaling_factor
    noise = jax.random.normal(steps.stream(key, "noise"), latents.shape)
    return (
        nchw(latents),
        nchw(noise),
        torch.from_numpy(np.array(timesteps)).long(),
        torch.from_numpy(np.array(context)),
    )


@dataclass(frozen=True)
class Differentiated:
    """A UNet's parameters and the step's gradient: one program, whatever is predicted."""

    rule: steps.StepRule
    params: Params
    gradient: Callable[[Params, steps.Examples], tuple[jax.Array, Params]]


@pytest.fixture(scope="module")
def differentiated(deep: Reference) -> Differentiated:
    program = make_program(deep, PredictionType.epsilon, None)
    params = {"unet": load_unet(deep.files, program.networks.unet.abstract())}
    examples = steps.draw_examples(program.rule, jnp.int32(0), *make_batch(0, DEEP_SIDE))
    gradient = quickly(partial(steps.loss_and_grads, program.rule), params, examples)
    return Differentiated(program.rule, params, gradient)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", [PredictionType.epsilon, PredictionType.v_prediction])
def test_gradients_of_every_parameter(
    deep: Reference,
    differentiated: Differentiated,
    kind: PredictionType,
    snr_gamma: float | None,
) -> None:
    objective = make_objective(DiffusionConfig(snr_gamma=snr_gamma), kind)
    rule, batch = replace(differentiated.rule, objective=objective), make_batch(0, DEEP_SIDE)
    examples = steps.draw_examples(rule, jnp.int32(3), *batch)
    ours, gradients = differentiated.gradient(differentiated.params, examples)

    deep.unet.zero_grad()
    inputs = drawn(rule, 3, batch, examples.timesteps)
    theirs = script_loss(deep.unet, *inputs, prediction_type=kind.name, snr_gamma=snr_gamma)
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
    parameters = dict(deep.unet.named_parameters())
    assert len(parameters) == len(flat(gradients["unet"]))
    for path, mine in flat(gradients["unet"]).items():
        found = array_to_torch(path, np.asarray(mine)).astype(np.float64).ravel()
        wanted = parameters[to_torch(path)].grad.double().numpy().ravel()
        sizes = np.linalg.norm(found), np.linalg.norm(wanted)
        name = "/".join(path)
        assert np.linalg.norm(found - wanted) <= GRADIENT_RTOL * sizes[1], name
        assert found @ wanted >= COSINE * sizes[0] * sizes[1], name


def test_five_updates(tmp_path: Path) -> None:
    """AdamW, clipping, the learning rate and the average, in the order of diffusers' script."""
    diffusers = import_module("diffusers")
    model = make_reference("sd1", tmp_path)
    program = make_program(model, PredictionType.epsilon, 5.0)
    rule = program.rule
    state = program.init(unet=load_unet(model.files, program.networks.unet.abstract()))
    draw = jax.jit(partial(steps.draw_examples, rule))
    step = quickly(partial(steps.update, rule), state, draw(jnp.int32(0), *make_batch(0)))

    parameters = list(model.unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-2)
    schedule = diffusers.optimization.get_scheduler(
        "linear", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=DECAY_STEPS
    )
    average = diffusers.training_utils.EMAModel(parameters)
    for number in range(5):
        batch = make_batch(10 * number)
        examples = draw(state.step, *batch)
        inputs = drawn(rule, number, batch, examples.timesteps)
        loss = script_loss(model.unet, *inputs, prediction_type="epsilon", snr_gamma=5.0)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(parameters)
        state, metrics = step(state, examples)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-6)
        assert float(metrics["lr"]) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
    names = [name for name, _ in model.unet.named_parameters()]
    assert state.ema is not None
    for ours, theirs in ((state.params, parameters), (state.ema, average.shadow_params)):
        wanted = {name: value.detach() for name, value in zip(names, theirs, strict=True)}
        for path, value in flat(ours["unet"]).items():
            reference = wanted[to_torch(path)].numpy()
            distance = np.linalg.norm(array_to_torch(path, np.asarray(value)) - reference)
            assert distance <= UPDATE_RTOL * np.linalg.norm(reference), "/".join(path)
