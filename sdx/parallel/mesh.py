"""The device mesh: three axes over the devices of this run, and the check that they are the ones
configured.

Axis `data` copies the model, `fsdp` shares its parameters (the batch is split over both), `tensor`
shares the width of attention and feed-forward layers. An axis is its size in `mesh.dcn`, over
slices or hosts, times its size in `mesh.ici`, over the devices of one; which sizes are possible is
decided in config/check_mesh.py, what an array does with the axes in sharding.py.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sdx.config.check_mesh import AXES, MeshSizes, mesh_sizes, num_parts, size_problems
from sdx.config.schema import HardwareConfig, MeshConfig, Platform
from sdx.parallel.agreement import process_count

BATCH_AXES = ("data", "fsdp")

Device = Any  # jax.Device, which is a variable to type checkers


class MeshError(ValueError):
    """The devices found are not those of `hardware`, or the mesh does not fit them."""


def claim_devices(hardware: HardwareConfig) -> None:
    """Tell JAX, before its first use of a device, which platform the run is for.

    A CPU has as many devices as the preset asks for, in a rehearsal too: they are virtual, and
    each process has its share. Without effect once JAX has started its devices; `make_mesh` then
    says if they are others.
    """
    if hardware.platform is Platform.cpu or hardware.simulate:
        with suppress(RuntimeError):
            jax.config.update("jax_platforms", "cpu")
            num_devices = (hardware.num_devices or process_count()) // process_count()
            jax.config.update("jax_num_cpu_devices", num_devices)


def make_mesh(
    mesh: MeshConfig, hardware: HardwareConfig, devices: Sequence[Device] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, tensor (Auto) over `devices`, by default all that JAX has.

    They may be described ones, of chips that are not here, and virtual ones of a CPU, which stand
    for as many slices or hosts as `hardware` says. Raises MeshError where the devices are not those
    of `hardware`, or the axes do not divide them.
    """
    devices = _check_devices(hardware, _found(hardware) if devices is None else devices)
    hardware = _as_found(hardware, devices)
    sizes = mesh_sizes(mesh, hardware)
    if sizes is None:
        raise MeshError(_impossible(mesh, hardware))
    grid = arrange(devices, sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Device], sizes: MeshSizes) -> np.ndarray:
    """The devices along data, fsdp and tensor: each part of `sizes.dcn` is a block of neighbours,
    laid out within as its network likes it.

    As `mesh_utils.create_hybrid_device_mesh`, but a part may be several hosts, or, where the
    devices of one process stand for many, a share of them.
    """
    devices = sorted(devices, key=_place)
    num_parts = math.prod(sizes.dcn)
    if num_parts == 1 or _is_one_torus(devices):
        return _arrange_part(devices, sizes.total)
    parts = np.array_split(np.arange(len(devices)), num_parts)
    _check_parts(devices, parts)
    blocks = np.empty(num_parts, dtype=object)
    for index, part in enumerate(parts):
        blocks[index] = _arrange_part([devices[i] for i in part], sizes.ici)
    return np.block(blocks.reshape(sizes.dcn).tolist())


def one_device_mesh() -> Mesh:
    """A mesh of the first device JAX has; for pictures outside of training."""
    return Mesh([[jax.devices()[:1]]], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_devices_mesh() -> Mesh:
    """A mesh of all devices of this process, each with the whole model, for many pictures."""
    devices = [[[device]] for device in jax.local_devices()]
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _impossible(mesh: MeshConfig, hardware: HardwareConfig) -> str:
    problems = "\n".join(map(str, size_problems(mesh, hardware)))
    parts, devices = num_parts(hardware), hardware.num_devices
    return problems or f"hardware.num_devices={devices}: must be a multiple of its {parts} hosts."


def _arrange_part(devices: Sequence[Device], shape: tuple[int, int, int]) -> np.ndarray:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _place(device: Device) -> tuple[int, int, int]:
    """Slice, process, number: devices that are close are neighbours in this order."""
    return getattr(device, "slice_index", 0) or 0, device.process_index, device.id


def _is_one_torus(devices: Sequence[Device]) -> bool:
    """TPUs of one slice: all are joined by their own network, however many hosts they are on."""
    return devices[0].platform == "tpu" and len({_place(device)[0] for device in devices}) == 1


def _check_parts(devices: Sequence[Device], parts: Sequence[np.ndarray]) -> None:
    """No host may be cut by `mesh.dcn`; devices of a CPU are virtual and may stand for any."""
    if devices[0].platform == "cpu":
        return
    host = _host_of(devices)
    for part in parts[1:]:
        first = devices[part[0]]
        if host(first) == host(devices[part[0] - 1]):
            count = sum(host(device) == host(first) for device in devices)
            raise MeshError(
                f"mesh.dcn: {len(parts)} parts would cut a host, which has {count} devices here; "
                "allowed: as many parts as there are hosts, or groups of hosts. "
                "fix: give hardware.num_hosts and mesh.dcn as they are on this machine."
            )


def _host_of(devices: Sequence[Device]) -> Callable[[Device], int]:
    """What tells hosts apart: the process, or the slice where there are several: JAX gives GPUs of
    one machine the same, also where each has a process of its own."""
    by_slice = len({_place(device)[0] for device in devices}) > 1
    return lambda device: _place(device)[0 if by_slice else 1]


def _as_found(hardware: HardwareConfig, devices: Sequence[Device]) -> HardwareConfig:
    """With the numbers of devices, slices and hosts where the preset leaves them to the machine."""
    if hardware.num_devices is not None:
        return hardware
    slices = len({_place(device)[0] for device in devices})
    return replace(
        hardware,
        num_devices=len(devices),
        num_slices=slices if hardware.platform is Platform.tpu else 1,
        num_hosts=len(set(map(_host_of(devices), devices))),
    )


def _found(hardware: HardwareConfig) -> list[Device]:
    """The devices JAX has; of virtual ones as many as asked for."""
    devices = jax.devices()
    is_virtual = hardware.platform is Platform.cpu or hardware.simulate
    if is_virtual and devices[0].platform == "cpu":
        return devices[: hardware.num_devices or process_count()]
    return devices


def _check_devices(hardware: HardwareConfig, devices: Sequence[Device]) -> Sequence[Device]:
    found = devices[0]
    faults = []
    if found.platform != hardware.platform.name and not hardware.simulate:
        faults.append(("platform", found.platform, hardware.platform.name))
    if hardware.device_kind not in (None, found.device_kind) and not hardware.simulate:
        faults.append(("device_kind", found.device_kind, hardware.device_kind))
    if hardware.num_devices is not None and len(devices) != hardware.num_devices:
        faults.append(("num_devices", len(devices), hardware.num_devices))
    slices = len({_place(device)[0] for device in devices})
    if found.platform == "tpu" and hardware.num_devices and slices != hardware.num_slices:
        faults.append(("num_slices", slices, hardware.num_slices))
    if faults:
        lines = [f"  hardware.{key}: found {got}, wanted {wanted}" for key, got, wanted in faults]
        raise MeshError(
            f"hardware={hardware.name} does not describe this machine:\n"
            + "\n".join(lines)
            + f"\nallowed here: {found.platform} with {len(devices)} x {found.device_kind}."
            + f"\nfix: pick the hardware=... of this machine{_another_name(faults)}; "
            + f"`python -m sdx.plan hardware={hardware.name} ...` says whether it would fit there, "
            + "and run_on=... starts it there (docs/slurm.md, docs/tpu.md)."
            + _unseen(hardware.platform, found.platform)
        )
    return devices


def _unseen(wanted: Platform, found: str) -> str:
    """What to install where JAX sees the CPU alone: without its plugin it does on any machine."""
    if found != "cpu" or wanted is Platform.cpu:
        return ""
    extra = "cuda" if wanted is Platform.gpu else "tpu"
    return f" If it has that hardware, JAX does not see it; pip install 'sdx[{extra}]'."


def _another_name(faults: Sequence[tuple[str, object, object]]) -> str:
    """What to type where nothing but the name of the chip differs."""
    if [key for key, _, _ in faults] != ["device_kind"]:
        return ""
    return f", or 'hardware.device_kind=\"{faults[0][1]}\"' if that is as fast"
