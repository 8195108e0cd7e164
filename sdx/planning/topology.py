"""The devices of `hardware` as its compiler describes them, on a machine that has none of them.

libtpu describes slices of TPUs and JAX's CUDA plugin describes GPUs; both then compile for what
they described. Only compiled, never run: these devices hold no arrays. A CPU describes itself.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from sdx.config.schema import HardwareConfig, Platform
from sdx.parallel.mesh import Device, claim_devices
from sdx.planning.compiled import ENVIRONMENT
from sdx.planning.gpu_target import TopologyError, gpu_target

_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class CompilerMissing(ValueError):
    """The compiler for this hardware is not installed."""


def has_compiler(platform: Platform) -> bool:
    """Whether programs for `platform` can be compiled here, and not only lowered."""
    modules = {Platform.tpu: ("libtpu",), Platform.gpu: _CUDA_PLUGINS, Platform.cpu: ("jax",)}
    return any(find_spec(name) is not None for name in modules[platform])


def check_described(hardware: HardwareConfig) -> None:
    """Raises what `described_devices` would, as far as that is known before JAX starts."""
    where = f"hardware={hardware.name}"
    if hardware.num_devices is None:
        raise TopologyError(
            f"hardware.num_devices: missing, {where} is whatever is found where it runs; compiling "
            "ahead needs to know; give hardware.num_devices=N, or a preset that says."
        )
    if hardware.platform is not Platform.tpu:
        return
    if hardware.topology is None:
        raise TopologyError(
            f"hardware.topology: missing, {where} does not say which TPUs; compiling ahead needs "
            "one slice in libtpu's words, as v4:2x2x4; give it, or pick hardware=tpu_v4_32 or "
            "another preset that does."
        )
    if not has_compiler(Platform.tpu):
        raise CompilerMissing(
            f"compile=true: {where} needs libtpu, the compiler for TPUs, which is not installed; "
            "pip install 'sdx[plan]', or leave compile=true out for the analytic answer."
        )


def described_devices(hardware: HardwareConfig) -> Sequence[Device]:
    """The devices of all slices or hosts of `hardware`; `make_mesh` takes them.

    Raises CompilerMissing without the platform's compiler, TopologyError where it refuses the
    description or where what it describes is not what the preset says.
    """
    check_described(hardware)
    os.environ |= ENVIRONMENT  # libtpu reads it when it is loaded, which this does
    devices = _DESCRIBE[hardware.platform](hardware)
    _check_agreement(hardware, devices)
    return devices


def _tpus(hardware: HardwareConfig) -> Sequence[Device]:
    named = {
        "chip_config_name": hardware.chip_config,
        "chips_per_host_bounds": hardware.chips_per_host and tuple(hardware.chips_per_host),
        "num_slices": hardware.num_slices if hardware.num_slices > 1 else None,
    }
    given = {name: value for name, value in named.items() if value is not None}
    try:
        found = topologies.get_topology_desc(hardware.topology or "", "tpu", **given)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise TopologyError(
            f"hardware.topology={hardware.topology}: libtpu refuses it ({reason}); allowed are "
            "names as v4:2x2x4 or v5e:4x8, with chip_config=megacore for v4 alone."
        ) from None
    return found.devices


def _gpus(hardware: HardwareConfig) -> Sequence[Device]:
    per_host = (hardware.num_devices or 1) // hardware.num_hosts
    found = topologies.get_topology_desc(
        hardware.name,
        "cuda",
        target_config=gpu_target(hardware),
        topology=f"1x{hardware.num_hosts}x{per_host}",
    )
    return found.devices


def _cpus(hardware: HardwareConfig) -> Sequence[Device]:
    claim_devices(hardware)
    return jax.devices("cpu")[: hardware.num_devices]


_DESCRIBE: Mapping[Platform, Callable[[HardwareConfig], Sequence[Device]]] = {
    Platform.tpu: _tpus,
    Platform.gpu: _gpus,
    Platform.cpu: _cpus,
}


def _check_agreement(hardware: HardwareConfig, devices: Sequence[Device]) -> None:
    """What the preset says in numbers must be what its topology says in libtpu's words."""
    hosts = {device.process_index for device in devices}
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    described: dict[str, tuple[Any, Any]] = {
        "num_devices": (hardware.num_devices, len(devices)),
        "device_kind": (hardware.device_kind or devices[0].device_kind, devices[0].device_kind),
    }
    if hardware.platform is not Platform.cpu:  # whose virtual devices are one process's
        described["num_hosts"] = (hardware.num_hosts, len(hosts))
        described["num_slices"] = (hardware.num_slices, len(slices))
    wrong = {key: pair for key, pair in described.items() if pair[0] != pair[1]}
    if wrong:
        lines = [
            f"  hardware.{key}={said}: described are {got}" for key, (said, got) in wrong.items()
        ]
        raise TopologyError(
            f"hardware={hardware.name} does not agree with hardware.topology={hardware.topology}, "
            f"chip_config={hardware.chip_config}, chips_per_host={hardware.chips_per_host}:\n"
            + "\n".join(lines)
            + "\nfix: the numbers, or the description; v4 has one device a chip with "
            "chip_config=megacore and two without."
        )
