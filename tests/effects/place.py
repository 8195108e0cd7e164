"""`mesh.*`, `hardware.*` and how `train.*` splits the work: which device holds what, and what
sdx.plan says."""

from dataclasses import replace
from math import prod
from typing import Any

import jax.numpy as jnp
import pytest
from pytest import approx

from sdx.experiment.planning import make_plan
from sdx.parallel import sharding
from sdx.parallel.mesh import MeshError, make_mesh
from sdx.planning.estimate import estimate
from sdx.planning.report import render
from sdx.training.step import Examples, loss_and_grads
from tests.effects.effect import Case, Effect
from tests.effects.tracing import Observer, primitives


def on_a_device(case: Case) -> dict[str, float]:
    """Shares that one device holds of the batch, of a convolution and of a product of attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 64)  # the model's arrays are small
        program = case.program
    middle = program.abstract_state.params["unet"]["mid_block"]
    product = middle["attentions"]["0"]["transformer_blocks"]["0"]["attn1"]["to_q"]["kernel"]
    convolution = middle["resnets"]["0"]["conv1"]["kernel"]
    arrays = {"batch": images(case), "conv": convolution, "to_q": product}
    return {
        name: prod(one.sharding.shard_shape(one.shape)) / one.size for name, one in arrays.items()
    }


def layout(case: Case) -> list[list[list[int]]]:
    """Which device lies where along data, fsdp and tensor."""
    return [[[one.id for one in tensor] for tensor in fsdp] for fsdp in case.mesh.devices]


def devices(case: Case) -> int | list[str]:
    """How many a start takes, or what it says of those that are there."""
    try:
        return make_mesh(case.config.mesh, case.config.hardware).size
    except MeshError as error:
        return [line.strip() for line in str(error).splitlines() if "found" in line]


def planned(label: str) -> Observer:
    """A line of sdx.plan, by its label; the title for an empty one."""

    def observe(case: Case) -> str:
        title, *lines = render(make_plan(case.config, compiles=False, level="O0")).splitlines()
        rows = {line[:16].strip(): line[16:] for line in lines}
        return rows[label] if label else title

    return observe


def images(case: Case) -> Any:
    """Of one update, as shapes."""
    return case.program.abstract_batch.images


def batch_size(case: Case) -> int:
    """Examples of one update."""
    return images(case).shape[0]


def passes(case: Case) -> list[int]:
    """Examples in each pass of one update through the network."""
    seen: list[int] = []

    def predict(params: Any, noisy: Any, timesteps: Any, conditioning: Any) -> Any:
        seen.append(noisy.shape[0])
        return noisy * params["unet"]["w"]

    rule = replace(case.program.rule, predict=predict, unroll=True)
    rows = jnp.zeros((case.program.global_batch_size, 1, 1, 1))
    numbers = rows[:, 0, 0, 0]
    examples = Examples(rows, rows, numbers.astype(jnp.int32), rows[:, 0], numbers)
    loss_and_grads(rule, {"unet": {"w": jnp.ones(())}}, examples)
    return seen


def rate_at_peak(case: Case) -> float | None:
    """Images a second with every device at its peak, by the work of one image; in TFLOP/s."""
    found = estimate(case.config)
    if found.speed.roofline is None:
        return None
    return found.speed.roofline * found.work.done / 1e12


def moments_held(case: Case) -> float:
    """Numbers the optimizer keeps for each weight."""
    held = estimate(case.config).device_bytes
    return held.optimizer / held.weights


EIGHT = ("mesh=dp", "hardware.num_devices=8", "train.global_batch_size=8")
CHIPS = ("mesh=dp", "hardware.num_devices=4")
HOSTS = ("hardware.num_devices=4", "hardware.num_hosts=2")
BY_DEVICE = (*EIGHT, "mesh.ici.tensor=2", "train.global_batch_size=null")

EFFECTS = [
    Effect(
        "mesh.ici.data",
        "2",
        on_a_device,
        {"batch": 1 / 8, "conv": 1, "to_q": 1},
        {"batch": 1 / 8, "conv": 1 / 4, "to_q": 1 / 4},  # two copies of what four devices share
        given=EIGHT,
        along=("mesh.ici.fsdp=4",),
    ),
    Effect(
        "mesh.ici.fsdp",
        "8",
        on_a_device,
        {"batch": 1 / 8, "conv": 1, "to_q": 1},
        {"batch": 1 / 8, "conv": 1 / 8, "to_q": 1 / 8},
        given=EIGHT,
    ),
    Effect(
        "mesh.ici.tensor",
        "2",
        on_a_device,
        {"batch": 1 / 8, "conv": 1, "to_q": 1},
        {"batch": 1 / 4, "conv": 1, "to_q": 1 / 2},
        given=EIGHT,
    ),
    Effect(
        "mesh.dcn.data",
        "2",
        layout,
        [[[0], [1], [2], [3]]],
        [[[0], [1]], [[2], [3]]],
        given=(*HOSTS, "mesh=fsdp", "mesh.dcn.fsdp=1"),
    ),
    Effect(
        "mesh.dcn.fsdp",
        "2",
        layout,
        [[[0]], [[1]], [[2]], [[3]]],
        [[[0], [2]], [[1], [3]]],  # across the hosts
        given=(*HOSTS, "mesh=dp", "mesh.dcn.data=1"),
    ),
    Effect(
        "mesh.dcn.tensor",
        "2",
        layout,
        [[[0]], [[1]], [[2]], [[3]]],
        [[[0, 2]], [[1, 3]]],
        given=(*HOSTS, "mesh=dp", "mesh.dcn.data=1"),
    ),
    Effect("hardware.name", "box", planned(""), "tiny on cpu", "tiny on box"),
    Effect(
        "hardware.platform",
        "tpu",
        devices,
        1,
        ["hardware.platform: found cpu, wanted tpu", "hardware.num_devices: found 8, wanted 1"],
    ),
    Effect(
        "hardware.device_kind",
        "TPU v4",
        devices,
        1,
        ["hardware.device_kind: found cpu, wanted TPU v4"],
    ),
    Effect("hardware.num_devices", "4", devices, 1, 4, given=("mesh=dp",)),
    Effect(
        "hardware.num_hosts",
        "2",
        planned("devices"),
        "4, mesh data 4 x fsdp 1 x tensor 1",
        "4 on 2 hosts, mesh data 4 x fsdp 1 x tensor 1",
        given=CHIPS,
    ),
    Effect(
        "hardware.hbm_gib",
        "1e-3",
        lambda case: estimate(case.config).fits,
        "undecided",
        "no",
    ),
    Effect(
        "hardware.hbm_gbps",
        "1e-3",
        lambda case: estimate(case.config).speed.bound_by,
        "compute",
        "memory",
        given=("hardware.peak_tflops=1",),
    ),
    Effect(
        "hardware.host_memory_gib",
        "0.5",
        lambda case: estimate(case.config).host.fits,
        None,
        False,
    ),
    Effect(
        "hardware.peak_tflops",
        "2.5",
        rate_at_peak,
        None,
        approx(2.5),
    ),
    Effect("optimizer.kind", "lion", moments_held, approx(2, rel=1e-3), approx(1, rel=1e-3)),
    Effect("train.global_batch_size", "6", batch_size, 4, 6),
    Effect(
        "train.per_device_batch_size",
        "0.5",
        batch_size,
        8,
        4,
        given=(*BY_DEVICE, "train.per_device_batch_size=1"),
    ),
    Effect("train.gradient_accumulation", "2", passes, [4], [2, 2]),
    Effect(
        "train.remat",
        "blocks",
        primitives("unet", "remat2"),
        {},
        {"remat2": 5},  # the ResNet blocks, each with the attention after it
    ),
    Effect("train.max_steps", "7", lambda case: case.setup.max_steps, 10, 7),
    Effect(
        "train.epochs",
        "2",
        lambda case: case.setup.max_steps,
        16,  # 64 examples in batches of 4
        32,
        given=("train.max_steps=null", "train.epochs=1"),
    ),
    Effect("train.max_samples", "10", lambda case: len(case.setup.source), 64, 10),
]
