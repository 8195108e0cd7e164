"""Mesh sizes, and the errors of a machine that is not the one configured."""

import jax
import pytest

from sdx.config.schema import HardwareConfig, MeshAxes, MeshConfig, Platform
from sdx.parallel.mesh import MeshError, axis_sizes, make_mesh

pytestmark = pytest.mark.fast


def cpu(num_devices: int) -> HardwareConfig:
    return HardwareConfig(name="cpu", platform=Platform.cpu, num_devices=num_devices)


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        (MeshAxes(), (8, 1, 1)),
        (MeshAxes(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshAxes(data=1, fsdp=8, tensor=1), (1, 8, 1)),
    ],
)
def test_minus_one_fills(axes: MeshAxes, sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(ici=axes), cpu(8))
    assert tuple(mesh.shape.values()) == sizes
    assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_one_device_of_a_cpu_that_has_more() -> None:
    assert make_mesh(MeshConfig(ici=MeshAxes()), cpu(1)).size == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            MeshAxes(fsdp=6),
            "mesh.ici.fsdp=6: must divide the 8 devices of hardware=gpu_h100_8; use 1, 2, 4 or 8.",
        ),
        (
            MeshAxes(fsdp=2, tensor=8),
            "mesh.ici.fsdp=2: must divide the 8 devices of hardware=gpu_h100_8 "
            "together with the other axes (8); use 1.",
        ),
        (
            MeshAxes(data=2, fsdp=2),
            "mesh.ici: data x fsdp x tensor is 4, but hardware=gpu_h100_8 has 8 devices; "
            "set one axis to -1 to fill.",
        ),
        (
            MeshAxes(fsdp=-1),
            "mesh.ici: data and fsdp are -1; one axis may fill what the others leave. "
            "Give the others a size.",
        ),
        (
            MeshAxes(tensor=0),
            "mesh.ici.tensor=0: must divide the 8 devices of hardware=gpu_h100_8; use 1, 2, "
            "4 or 8.",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(axes: MeshAxes, message: str) -> None:
    with pytest.raises(MeshError) as error:
        axis_sizes(axes, 8, "gpu_h100_8")
    assert str(error.value) == message


def test_another_machine_is_an_error_that_says_what_to_do() -> None:
    hardware = HardwareConfig(
        name="tpu_v4_32", platform=Platform.tpu, device_kind="TPU v4", num_devices=16
    )
    with pytest.raises(MeshError) as error:
        make_mesh(MeshConfig(ici=MeshAxes()), hardware)
    message = str(error.value)
    for part in (
        "hardware=tpu_v4_32 does not describe this machine",
        "hardware.platform: found cpu, wanted tpu",
        "hardware.device_kind: found cpu, wanted TPU v4",
        "hardware.num_devices: found 8, wanted 16",
        "allowed here: cpu with 8 x cpu",
        "python -m sdx.plan hardware=tpu_v4_32",
        "run_on=",
    ):
        assert part in message
