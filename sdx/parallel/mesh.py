"""The device mesh: three axes over the devices of this run, and the check that they are the ones
configured.

Axis `data` copies the model, `fsdp` shares its parameters (the batch is split over both), `tensor`
shares the width of attention and feed-forward layers. Sizes come from `mesh.ici`; what an array
does with the axes is in sharding.py.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from sdx.config.schema import HardwareConfig, MeshAxes, MeshConfig, Platform

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Device = Any  # jax.Device, which is a variable to type checkers


class MeshError(ValueError):
    """The devices found are not those of `hardware`, or the mesh does not fit them."""


def claim_devices(hardware: HardwareConfig) -> None:
    """Tell JAX, before its first use of a device, which platform the run is for.

    A CPU has as many devices as the preset asks for: they are virtual. Without effect once JAX has
    started its devices; `make_mesh` then says if they are others.
    """
    if hardware.platform is Platform.cpu:
        with suppress(RuntimeError):
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", hardware.num_devices or 1)


def make_mesh(
    mesh: MeshConfig, hardware: HardwareConfig, devices: Sequence[Device] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, tensor (Auto) over `devices`, by default all that JAX has.

    Raises MeshError where the devices are not those of `hardware` or `mesh.ici` does not divide
    them.
    """
    devices = _check_devices(hardware, _found(hardware) if devices is None else devices)
    shape = axis_sizes(mesh.ici, len(devices), hardware.name)
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device_mesh() -> Mesh:
    """A mesh of the first device JAX has; for pictures outside of training."""
    return Mesh([[jax.devices()[:1]]], AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_devices_mesh() -> Mesh:
    """A mesh of all devices of this process, each with the whole model, for many pictures."""
    devices = [[[device]] for device in jax.local_devices()]
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(axes: MeshAxes, num_devices: int, hardware_name: str) -> tuple[int, int, int]:
    """Sizes of data, fsdp and tensor for `num_devices`, with the axis given as -1 filled in."""
    sizes = {name: getattr(axes, name) for name in AXES}
    filled = [name for name, size in sizes.items() if size == -1]
    if len(filled) > 1:
        raise MeshError(
            f"mesh.ici: {' and '.join(filled)} are -1; one axis may fill what the others leave. "
            "Give the others a size."
        )
    for name, size in sizes.items():
        rest = math.prod(other for axis, other in sizes.items() if axis != name and other > 0)
        if size != -1 and (size < 1 or num_devices % (size * rest)):
            _refuse(name, size, num_devices, rest, hardware_name)
    product = math.prod(size for size in sizes.values() if size != -1)
    if not filled and product != num_devices:
        raise MeshError(
            f"mesh.ici: data x fsdp x tensor is {product}, but hardware={hardware_name} has "
            f"{num_devices} devices; set one axis to -1 to fill."
        )
    data, fsdp, tensor = (num_devices // product if s == -1 else s for s in sizes.values())
    return data, fsdp, tensor


def _refuse(axis: str, size: int, num_devices: int, rest: int, hardware_name: str) -> None:
    room = num_devices // rest if num_devices % rest == 0 else num_devices
    possible = [str(n) for n in range(1, room + 1) if room % n == 0]
    choices = possible[0] if len(possible) == 1 else f"{', '.join(possible[:-1])} or {possible[-1]}"
    times = f" together with the other axes ({rest})" if rest > 1 else ""
    raise MeshError(
        f"mesh.ici.{axis}={size}: must divide the {num_devices} devices of "
        f"hardware={hardware_name}{times}; use {choices}."
    )


def _found(hardware: HardwareConfig) -> list[Device]:
    """The devices JAX has; on CPU as many of them as asked for, since there they are virtual."""
    devices = jax.devices()
    if hardware.platform is Platform.cpu and devices[0].platform == "cpu":
        return devices[: hardware.num_devices or 1]
    return devices


def _check_devices(hardware: HardwareConfig, devices: Sequence[Device]) -> Sequence[Device]:
    found = devices[0]
    faults = []
    if found.platform != hardware.platform.name:
        faults.append(("platform", found.platform, hardware.platform.name))
    if hardware.device_kind is not None and found.device_kind != hardware.device_kind:
        faults.append(("device_kind", found.device_kind, hardware.device_kind))
    if hardware.num_devices is not None and len(devices) != hardware.num_devices:
        faults.append(("num_devices", len(devices), hardware.num_devices))
    if faults:
        lines = [f"  hardware.{key}: found {got}, wanted {wanted}" for key, got, wanted in faults]
        raise MeshError(
            f"hardware={hardware.name} does not describe this machine:\n"
            + "\n".join(lines)
            + f"\nallowed here: {found.platform} with {len(devices)} x {found.device_kind}."
            + "\nfix: pick the hardware=... of this machine; "
            + f"`python -m sdx.plan hardware={hardware.name} ...` says whether it would fit there, "
            + "and run_on=... starts it there (this version has run_on=local alone)."
        )
    return devices
