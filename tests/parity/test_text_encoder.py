"""A text encoder trained with its UNet, against torch run live.

sdx draws and torch computes: text states, loss, gradients through the UNet into the text encoder,
one clipping over both networks, AdamW with two groups, the learning rate of each.
"""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdx.config.schema import (
    LrScheduleConfig,
    LrScheduleKind,
    OptimizerConfig,
    OptimizerKind,
    PredictionType,
)
from sdx.models.module import flat
from sdx.training import step as steps
from sdx.training.program import Program, build
from sdx.training.state import Params
from sdx.weights.load import LOADERS
from sdx.weights.names import array_to_torch, to_torch
from tests.micro import BATCH_SIZE, micro_config, micro_mesh
from tests.parity.sides import nchw, normal, quickly, script_loss
from tests.weights.conftest import NUM_TOKENS, Reference, make_reference

LR, TEXT_ENCODER_LR = 1e-3, 2e-4
MAX_GRAD_NORM = 0.01  # below what it is, so that both are clipped
WARMUP_STEPS, DECAY_STEPS = 2, 20
NUM_UPDATES = 3
GRADIENT_RTOL, UPDATE_RTOL = 1e-4, 1e-6
# Softmax takes no notice of it: its gradient is rounding alone, which AdamW makes as large as any.
WITHOUT_EFFECT = "k_proj.bias"
Batch = tuple[jax.Array, jax.Array, jax.Array]


def make_program(model: Reference) -> Program:
    config = replace(
        micro_config(text_encoder=True),
        model=replace(model.model, prediction_type=PredictionType.v_prediction),
        optimizer=OptimizerConfig(
            kind=OptimizerKind.adamw,
            lr=LR,
            text_encoder_lr=TEXT_ENCODER_LR,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        lr_schedule=LrScheduleConfig(
            kind=LrScheduleKind.linear, warmup_steps=WARMUP_STEPS, decay_steps=DECAY_STEPS
        ),
    )
    return build(config, micro_mesh(), max_steps=DECAY_STEPS)


def make_batch(seed: int) -> Batch:
    """Moments as wide as real ones are (deviation 5, nearly certain), token ids, full weights."""
    mean = 5 * normal(seed, BATCH_SIZE, 8, 8, 4)
    moments = np.concatenate([mean, np.full_like(mean, -6)], axis=-1)
    tokens = np.random.default_rng(seed).integers(0, 99, (BATCH_SIZE, NUM_TOKENS), dtype=np.int32)
    return jnp.asarray(moments), jnp.asarray(tokens), jnp.ones(BATCH_SIZE)


def torch_loss(model: Reference, rule: steps.StepRule, step: int, batch: Batch) -> torch.Tensor:
    """The loss of what sdx draws at `step`."""
    key = steps.step_key(rule.seed, jnp.int32(step))
    latents = steps.sample_latents(steps.stream(key, "latents"), batch[0]) * rule.scaling_factor
    noise = jax.random.normal(steps.stream(key, "noise"), latents.shape)
    timesteps = steps.draw_examples(rule, jnp.int32(step), *batch).timesteps
    context = model.text_encoder(torch.from_numpy(np.array(batch[1])).long()).last_hidden_state
    return script_loss(
        model.unet,
        nchw(latents),
        nchw(noise),
        torch.from_numpy(np.array(timesteps)).long(),
        context,
        prediction_type="v_prediction",
        snr_gamma=None,
    )


def test_updates_of_both_networks(tmp_path: Path) -> None:
    diffusers = import_module("diffusers")
    model = make_reference("sd2", tmp_path)
    program = make_program(model)
    rule, trained = program.rule, program.abstract_state.params
    assert trained.keys() == {"unet", "text_encoder"}
    state = program.init(**{name: LOADERS[name](model.files, trained[name]) for name in trained})
    step = quickly(lambda *args: steps.train_step(rule, *args), state, *make_batch(0))

    networks = {"unet": model.unet, "text_encoder": model.text_encoder}
    groups = {name: list(network.parameters()) for name, network in networks.items()}
    rates = {"unet": LR, "text_encoder": TEXT_ENCODER_LR}
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "lr": rates[name]} for name in networks], weight_decay=1e-2
    )
    schedule = diffusers.optimization.get_scheduler(
        "linear", optimizer, num_warmup_steps=WARMUP_STEPS, num_training_steps=DECAY_STEPS
    )
    for number in range(NUM_UPDATES):
        batch = make_batch(10 * number)
        loss = torch_loss(model, rule, number, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [*groups["unet"], *groups["text_encoder"]], MAX_GRAD_NORM
        )
        clipped = {name: p.grad.clone() for name, p in model.text_encoder.named_parameters()}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state, metrics = step(state, *batch)
        if number == 0:  # the first moments are 1 - b1 of the gradient
            first: Any = state.opt_state
            gradients = jax.tree.map(lambda m: np.asarray(m) / 0.1, first.mu["text_encoder"])
            assert_gradients(gradients, {name: grad.numpy() for name, grad in clipped.items()})
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=2e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
        for name, rate in zip(("lr", "lr_text_encoder"), schedule.get_last_lr(), strict=True):
            assert float(metrics[name]) == pytest.approx(rate, abs=1e-9)
    for name, network in networks.items():
        assert_parameters(state.params[name], network, rate=rates[name])


def assert_gradients(ours: Params, wanted: dict[str, np.ndarray]) -> None:
    assert len(wanted) == len(flat(ours))
    whole = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in wanted.values()))
    for path, value in flat(ours).items():
        name = to_torch(path)
        distance = np.linalg.norm(array_to_torch(path, np.asarray(value)) - wanted[name])
        size = whole if name.endswith(WITHOUT_EFFECT) else np.linalg.norm(wanted[name])
        assert distance <= GRADIENT_RTOL * size, name


def assert_parameters(ours: Params, network: torch.nn.Module, *, rate: float) -> None:
    wanted = {name: p.detach().numpy() for name, p in network.named_parameters()}
    for path, value in flat(ours).items():
        name = to_torch(path)
        difference = array_to_torch(path, np.asarray(value)) - wanted[name]
        if name.endswith(WITHOUT_EFFECT):
            assert np.abs(difference).max() <= 2 * NUM_UPDATES * rate, name
        else:
            bound = UPDATE_RTOL * np.linalg.norm(wanted[name])
            assert np.linalg.norm(difference) <= bound, name
