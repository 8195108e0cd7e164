"""Rules of `mesh.*`: which axis sizes the devices, slices and hosts of `hardware` allow.

An axis is the product of its size in `mesh.dcn`, over slices or hosts, and its size in `mesh.ici`,
over the devices of one part. The parts are the slices of TPUs where there are several, else hosts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sdx.config.errors import Problem, any_of
from sdx.config.schema import Config, DcnAxes, HardwareConfig, MeshAxes, MeshConfig, Platform

AXES = ("data", "fsdp", "tensor")
Sizes = tuple[int, int, int]
"""Of data, fsdp and tensor."""


@dataclass(frozen=True)
class MeshSizes:
    """What every axis is made of, with nothing left to fill."""

    ici: Sizes
    dcn: Sizes

    @property
    def total(self) -> Sizes:
        """Devices along each axis."""
        data, fsdp, tensor = (a * b for a, b in zip(self.ici, self.dcn, strict=True))
        return data, fsdp, tensor


def mesh_sizes(mesh: MeshConfig, hardware: HardwareConfig) -> MeshSizes | None:
    """The sizes on `hardware`; None where they are impossible, or the devices unknown."""
    devices = hardware.num_devices
    if devices is None or not _is_possible(hardware) or any(size_problems(mesh, hardware)):
        return None
    if devices % num_parts(hardware):
        return None
    dcn = _outer(mesh, hardware)
    return MeshSizes(_filled(mesh.ici, devices // math.prod(dcn)), dcn)


def num_parts(hardware: HardwareConfig) -> int:
    """What `mesh.dcn` is over: slices where there are several, else hosts."""
    return hardware.num_slices if hardware.num_slices > 1 else hardware.num_hosts


def batch_shares(mesh: MeshConfig, hardware: HardwareConfig) -> int | None:
    """Parts a batch is split into; None where the mesh does not say it."""
    if sizes := mesh_sizes(mesh, hardware):
        return math.prod(sizes.total[:2])
    split = [getattr(axes, name) for axes in (mesh.ici, mesh.dcn) for name in AXES[:2]]
    return math.prod(split) if hardware.num_devices is None and min(split) > 0 else None


def mesh_problems(config: Config) -> Iterator[Problem]:
    """Sizes that cannot be, with those that can."""
    return size_problems(config.mesh, config.hardware)


def size_problems(mesh: MeshConfig, hardware: HardwareConfig) -> Iterator[Problem]:
    """As `mesh_problems`; where the number of devices is unknown, what is wrong for any."""
    malformed = [*_malformed("mesh.dcn", mesh.dcn), *_malformed("mesh.ici", mesh.ici)]
    yield from malformed
    if malformed or not _is_possible(hardware):
        return
    outer = _dcn(mesh.dcn, hardware)
    yield from outer
    if not outer or hardware.num_slices > 1:
        yield from _ici(mesh, hardware)


def _is_possible(hardware: HardwareConfig) -> bool:
    """Its bounds say what is wrong with it."""
    devices = 1 if hardware.num_devices is None else hardware.num_devices
    return min(devices, hardware.num_hosts, hardware.num_slices) >= 1


def _sizes(axes: MeshAxes | DcnAxes) -> dict[str, int]:
    return {name: getattr(axes, name) for name in AXES}


def _given(axes: MeshAxes | DcnAxes) -> dict[str, int]:
    return {name: size for name, size in _sizes(axes).items() if size != -1}


def _filled(axes: MeshAxes | DcnAxes, total: int) -> Sizes:
    rest = total // math.prod(_given(axes).values())
    data, fsdp, tensor = (rest if size == -1 else size for size in _sizes(axes).values())
    return data, fsdp, tensor


def _outer(mesh: MeshConfig, hardware: HardwareConfig) -> Sizes:
    """`mesh.dcn` filled. The hosts of one TPU slice share its network, so that nothing is left to
    fill where `mesh.ici` takes all of its devices."""
    is_one_network = hardware.platform is Platform.tpu and hardware.num_slices == 1
    taken = math.prod(_sizes(mesh.ici).values())  # negative while one of them fills
    all_taken = is_one_network and taken == hardware.num_devices
    return _filled(mesh.dcn, 1 if all_taken else num_parts(hardware))


def _malformed(path: str, axes: MeshAxes | DcnAxes) -> Iterator[Problem]:
    sizes = _sizes(axes)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            yield Problem(f"{path}.{name}", str(size), "must be at least 1, or -1 to fill")
    fills = [name for name, size in sizes.items() if size == -1]
    for name in fills[1:]:
        rule = f"only one axis may fill, {path}.{fills[0]} does"
        yield Problem(f"{path}.{name}", "-1", rule)


def _dcn(axes: DcnAxes, hardware: HardwareConfig) -> list[Problem]:
    """Slices must be used up; hosts may also be left to `mesh.ici`, all of them or in groups."""
    are_slices = hardware.num_slices > 1
    if hardware.num_devices is None and not are_slices:
        return []  # the hosts are those found where it runs
    parts = _Parts(num_parts(hardware), "slice" if are_slices else "host", hardware.name)
    return parts.problems("mesh.dcn", axes, all_used=are_slices)


def _ici(mesh: MeshConfig, hardware: HardwareConfig) -> list[Problem]:
    devices, parts = hardware.num_devices, num_parts(hardware)
    if hardware.num_slices == 1:
        parts = math.prod(_outer(mesh, hardware))
    if devices is None or devices % parts:
        return []  # the rules of hardware say so
    where = f" in each of the {parts} parts of mesh.dcn" if parts > 1 else ""
    each = _Parts(devices // parts, "device", hardware.name, where)
    return each.problems("mesh.ici", mesh.ici, all_used=True)


@dataclass(frozen=True)
class _Parts:
    """Devices, hosts or slices that axes are over."""

    count: int
    noun: str
    hardware: str
    where: str = ""

    def __str__(self) -> str:
        return (
            f"{self.count} {self.noun}{'s' * (self.count > 1)} of hardware={self.hardware}"
            f"{self.where}"
        )

    def problems(self, path: str, axes: MeshAxes | DcnAxes, *, all_used: bool) -> list[Problem]:
        """What keeps the axes from using up the parts or, not `all_used`, from dividing them."""
        given = _given(axes)
        divisors = any_of(_divisors(self.count))
        odd = [
            Problem(f"{path}.{name}", str(size), f"must divide the {self}", f"use {divisors}")
            for name, size in given.items()
            if self.count % size
        ]
        product, has_fill = math.prod(given.values()), len(given) < len(AXES)
        may_divide = has_fill or not all_used
        fits = self.count % product == 0 if may_divide else product == self.count
        if odd or fits:
            return odd
        sizes = " x ".join(f"{name} {size}" for name, size in given.items())
        rule = f"{sizes} is {product}, but there are {self}"
        return [Problem(path, None, rule, self._choices(path, given, may_divide))]

    def _choices(self, path: str, given: dict[str, int], may_divide: bool) -> str:
        """Sizes of one axis that are possible beside the others."""
        product, choices = math.prod(given.values()), []
        for name, size in given.items():
            room, odd = divmod(self.count, product // size)
            if not odd:
                choices.append(f"{path}.{name}={any_of(_divisors(room) if may_divide else [room])}")
        end = f"axes whose product {'divides' if may_divide else 'is'} {self.count}"
        return f"use {', or '.join([*choices, end])}"


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
