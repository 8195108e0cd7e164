"""What a configuration would hold and compute on its hardware, without that hardware.

The program of the run is built on virtual CPU devices and its abstract arrays are measured: shapes
and shardings are those of the run, and nothing is allocated or compiled. Not counted: activations
and the compiler's temporaries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from sdx.config import resolve
from sdx.config.errors import ConfigError, Problem
from sdx.config.schema import Config, HardwareConfig, Platform
from sdx.parallel.mesh import Device, claim_devices, make_mesh
from sdx.training.program import Program, build

GIB = 2**30
VIRTUAL_DEVICES = 512  # can be claimed once a process, and a sweep plans many targets; 0.1 s

Fits = Literal["no", "undecided", "unknown"]


class PlanError(ValueError):
    """This process cannot make as many virtual devices as the target has."""


@dataclass(frozen=True)
class Parameters:
    """Numbers in each network, trained and frozen ones alike."""

    unet: int
    vae: int
    text_encoder: int


@dataclass(frozen=True)
class DeviceBytes:
    """What one device holds through a step, activations and temporaries left out."""

    weights: int
    ema: int
    optimizer: int
    """Moments, and the counters of the state."""
    gradients: int
    """All at once, because their global norm decides whether the step counts; in the type of the
    weights, though a compiler may hold what it computed in bfloat16 as that."""
    frozen: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.ema + self.optimizer + self.gradients + self.frozen


@dataclass(frozen=True)
class Estimate:
    """One configuration on the hardware it names."""

    model: str
    hardware: str
    num_devices: int
    num_hosts: int
    mesh: dict[str, int]
    """Size of each axis."""
    parameters: Parameters
    trains_text_encoder: bool
    resolution: int
    """Pixels on one side."""
    global_batch_size: int
    gradient_accumulation: int
    device_bytes: DeviceBytes
    sharded_share: float
    """Share of the state's bytes in arrays of which a device holds only a part."""
    checkpoint_bytes: int
    """The whole state, uncompressed."""
    flops_per_step: float
    """Of the model, forward and backward; recomputation not counted."""
    hbm_bytes: int | None
    """Memory of one device; None where the preset does not say."""
    peak_tflops: float | None

    @property
    def per_device_batch_size(self) -> float:
        """Examples on each device in one micro-step, as in train.per_device_batch_size."""
        return self.global_batch_size / self.num_devices / self.gradient_accumulation

    @property
    def flops_per_device(self) -> float:
        """Of one step."""
        return self.flops_per_step / self.num_devices

    @property
    def max_images_per_s(self) -> float | None:
        """Images a second with every device at its peak, which no run reaches; None if unknown."""
        if self.peak_tflops is None:
            return None
        return self.global_batch_size * self.peak_tflops * 1e12 / self.flops_per_device

    @property
    def fits(self) -> Fits:
        """`no` where these bytes alone are too many, `undecided` where activations decide."""
        if self.hbm_bytes is None:
            return "unknown"
        return "no" if self.device_bytes.total > self.hbm_bytes else "undecided"


def estimate(config: Config) -> Estimate:
    """What `config` needs on `config.hardware`; looks at neither data, weights nor this machine.

    Claims JAX for virtual CPU devices, so it belongs into a process that does nothing else. Raises
    ConfigError where the number of devices is not given, PlanError where JAX has started with
    fewer, MeshError or BatchError where mesh or batch do not fit the devices.
    """
    mesh = _described_mesh(config)
    # Where a decaying learning rate ends changes no size, so examples need not be known.
    program = build(config, mesh, max_steps=resolve.max_steps(config, 1, mesh.size))
    state, hardware = program.abstract_state, config.hardware
    return Estimate(
        model=config.model.name,
        hardware=hardware.name,
        num_devices=mesh.size,
        num_hosts=hardware.num_hosts,
        mesh=dict(mesh.shape),
        parameters=_parameters(program),
        trains_text_encoder="text_encoder" in state.params,
        resolution=resolve.resolution(config),
        global_batch_size=program.global_batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        device_bytes=_device_bytes(program),
        sharded_share=_sharded_share(state),
        checkpoint_bytes=_whole_bytes(jax.tree.leaves(state)),
        flops_per_step=program.flops_per_step,
        hbm_bytes=None if hardware.hbm_gib is None else int(hardware.hbm_gib * GIB),
        peak_tflops=hardware.peak_tflops,
    )


def _described_mesh(config: Config) -> Mesh:
    """The mesh of the target over virtual devices of this machine."""
    hardware = config.hardware
    if hardware.num_devices is None:
        rule = f"missing, hardware={hardware.name} is whatever is found where it runs"
        fix = "give hardware.num_devices=N, or a preset that says"
        raise ConfigError([Problem("hardware.num_devices", None, rule, fix)])
    virtual = replace(hardware, platform=Platform.cpu, device_kind=None)
    return make_mesh(config.mesh, virtual, _virtual_devices(virtual, hardware.num_devices))


def _virtual_devices(hardware: HardwareConfig, count: int) -> Sequence[Device]:
    claim_devices(replace(hardware, num_devices=max(count, VIRTUAL_DEVICES)))
    found = jax.devices("cpu")
    if len(found) < count:
        raise PlanError(
            f"hardware.num_devices={count}: JAX has started in this process with {len(found)} CPU "
            "devices; plan in a process of its own."
        )
    return found[:count]


def _parameters(program: Program) -> Parameters:
    def count(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    networks = program.abstract_state.params | program.abstract_frozen
    return Parameters(**{name: count(params) for name, params in networks.items()})


def _device_bytes(program: Program) -> DeviceBytes:
    state = program.abstract_state
    weights, ema = _bytes_on_a_device(state.params), _bytes_on_a_device(state.ema)
    return DeviceBytes(
        weights=weights,
        ema=ema,
        optimizer=_bytes_on_a_device(state) - weights - ema,
        gradients=weights,  # in the type and place of the weights
        frozen=_bytes_on_a_device(program.abstract_frozen),
    )


def _bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _sharded_share(state: Any) -> float:
    leaves = jax.tree.leaves(state)
    split = [leaf for leaf in leaves if leaf.sharding.shard_shape(leaf.shape) != leaf.shape]
    return _whole_bytes(split) / _whole_bytes(leaves)


def _whole_bytes(leaves: Sequence[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
