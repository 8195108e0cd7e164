"""Which device lies where in a mesh over slices and hosts, and the errors of a machine that is not
the one configured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from sdx.config.check_mesh import MeshSizes, Sizes, mesh_sizes
from sdx.config.schema import DcnAxes, HardwareConfig, MeshAxes, MeshConfig, Platform
from sdx.parallel.mesh import MeshError, arrange, make_mesh

pytestmark = pytest.mark.fast


def cpu(num_devices: int, num_hosts: int = 1, num_slices: int = 1) -> HardwareConfig:
    return HardwareConfig(
        name="cpu",
        platform=Platform.cpu,
        num_devices=num_devices,
        num_hosts=num_hosts,
        num_slices=num_slices,
    )


@dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh looks at."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0


def two_slices() -> list[Chip]:
    """2 x 2 x 2 chips each, on two hosts."""
    return [
        Chip(100 * (half + 1) + i, 2 * half + i // 4, half, (i & 1, i >> 1 & 1, i >> 2))
        for half in range(2)
        for i in range(8)
    ]


def gpus(num_processes: int, *, num_hosts: int = 4) -> list[Chip]:
    """16 on four hosts, whose processes were started round-robin."""
    per_process = 16 // num_processes
    return [
        Chip(i, i // per_process, i // per_process % num_hosts, platform="gpu", device_kind="GPU")
        for i in range(16)
    ]


def hosts_of(grid: np.ndarray) -> list[list[int]]:
    """The hosts along each row of data."""
    return [sorted({chip.slice_index for chip in row.flat}) for row in grid]


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        (MeshAxes(), (8, 1, 1)),
        (MeshAxes(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshAxes(data=1, fsdp=8, tensor=1), (1, 8, 1)),
    ],
)
def test_minus_one_fills(axes: MeshAxes, sizes: Sizes) -> None:
    mesh = make_mesh(MeshConfig(ici=axes), cpu(8))
    assert tuple(mesh.shape.values()) == sizes
    assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_on_one_slice_the_devices_of_all_hosts_may_be_one_axis() -> None:
    pod = HardwareConfig(name="v4", platform=Platform.tpu, num_devices=16, num_hosts=4)
    fill = DcnAxes(data=1, fsdp=-1)
    sizes = mesh_sizes(MeshConfig(MeshAxes(data=1, fsdp=16), fill), pod)
    assert sizes == MeshSizes((1, 16, 1), (1, 1, 1))
    assert mesh_sizes(MeshConfig(MeshAxes(data=1, fsdp=-1), fill), pod) == MeshSizes(
        (1, 4, 1), (1, 4, 1)
    )
    hosts = replace(pod, platform=Platform.gpu)
    assert mesh_sizes(MeshConfig(MeshAxes(data=1, fsdp=16), fill), hosts) is None


@pytest.mark.parametrize("hardware", [cpu(8, num_hosts=4), cpu(8, num_hosts=8, num_slices=4)])
def test_virtual_devices_stand_for_slices_or_hosts_in_their_order(hardware: HardwareConfig) -> None:
    """As the target lays them out: neighbours share a part, an axis is its parts one by one."""
    hsdp = MeshConfig(ici=MeshAxes(data=1, fsdp=-1), dcn=DcnAxes(data=-1))
    mesh = make_mesh(hsdp, hardware)
    assert [[d.id for d in row.flat] for row in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    both = MeshConfig(ici=MeshAxes(data=1, fsdp=-1), dcn=DcnAxes(data=2, fsdp=2))
    across = make_mesh(both, hardware)
    assert [[d.id for d in row.flat] for row in across.devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    outer = MeshConfig(ici=MeshAxes(data=1, tensor=2), dcn=DcnAxes(tensor=-1))
    assert [d.id for d in make_mesh(outer, hardware).devices.flat] == [*range(8)]


def test_one_device_of_a_cpu_that_has_more() -> None:
    assert make_mesh(MeshConfig(ici=MeshAxes()), cpu(1)).size == 1


@pytest.mark.parametrize("dcn", [(2, 1, 1), (1, 2, 1)])
def test_slices_are_laid_out_as_jax_does(dcn: Sizes) -> None:
    chips = two_slices()
    grid = arrange(chips[::-1], MeshSizes(ici=(2, 4, 1), dcn=dcn))
    expected = mesh_utils.create_hybrid_device_mesh((2, 4, 1), dcn, chips)
    np.testing.assert_array_equal(grid, expected)
    if dcn[0] == 2:
        assert hosts_of(grid) == [[0], [0], [1], [1]]


def test_hosts_of_one_slice_are_one_torus() -> None:
    """The same sizes as over hosts, but each axis where the chips' own network is."""
    chips = two_slices()[:8]
    grid = arrange(chips, MeshSizes(ici=(1, 4, 1), dcn=(2, 1, 1)))
    np.testing.assert_array_equal(grid, mesh_utils.create_device_mesh((2, 4, 1), chips))


@pytest.mark.parametrize("num_processes", [4, 16])
def test_gpus_are_grouped_by_host_however_processes_are_numbered(num_processes: int) -> None:
    """Also in groups of hosts, and with a process for each GPU."""
    chips = gpus(num_processes)
    grid = arrange(chips, MeshSizes(ici=(1, 4, 1), dcn=(4, 1, 1)))
    assert hosts_of(grid) == [[0], [1], [2], [3]]
    if num_processes == 4:
        expected = mesh_utils.create_hybrid_device_mesh(
            (1, 4, 1), (4, 1, 1), chips, process_is_granule=True
        )
        np.testing.assert_array_equal(grid, expected)
    pairs = arrange(chips, MeshSizes(ici=(1, 8, 1), dcn=(2, 1, 1)))
    assert hosts_of(pairs) == [[0, 1], [2, 3]]


def test_a_host_is_not_cut() -> None:
    with pytest.raises(MeshError, match=r"mesh.dcn: 8 parts would cut a host, which has 4 devices"):
        arrange(gpus(4), MeshSizes(ici=(1, 2, 1), dcn=(8, 1, 1)))


@pytest.mark.parametrize(
    ("platform", "chips", "sizes"),
    [(Platform.tpu, two_slices(), (2, 8, 1)), (Platform.gpu, gpus(16), (4, 4, 1))],
)
def test_parts_are_counted_where_the_preset_leaves_devices_to_the_machine(
    platform: Platform, chips: Sequence[Chip], sizes: Sizes
) -> None:
    hsdp = MeshConfig(ici=MeshAxes(data=1, fsdp=-1), dcn=DcnAxes(data=-1))
    mesh = make_mesh(hsdp, HardwareConfig(name="found", platform=platform), chips)
    assert mesh.devices.shape == sizes


def test_what_does_not_divide_what_is_found_is_refused() -> None:
    """Where the preset leaves the number to the machine, as the configuration's check would."""
    bare = HardwareConfig(name="gpu", platform=Platform.gpu)
    with pytest.raises(MeshError, match=r"mesh.ici.fsdp=3: must divide the 16 devices of hardware"):
        make_mesh(MeshConfig(ici=MeshAxes(fsdp=3)), bare, gpus(4))


def test_another_number_of_slices_is_an_error() -> None:
    hardware = HardwareConfig(name="one", platform=Platform.tpu, num_devices=16)
    with pytest.raises(MeshError, match="hardware.num_slices: found 2, wanted 1"):
        make_mesh(MeshConfig(ici=MeshAxes()), hardware, two_slices())


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
        "run_on=... starts it there (docs/slurm.md, docs/tpu.md).",
        "If it has that hardware, JAX does not see it; pip install 'sdx[tpu]'",
    ):
        assert part in message


def test_a_gpu_that_jax_has_no_plugin_for_is_an_error_that_names_it() -> None:
    hardware = HardwareConfig(name="gpu", platform=Platform.gpu)
    with pytest.raises(MeshError, match=r"JAX does not see it; pip install 'sdx\[cuda\]'"):
        make_mesh(MeshConfig(ici=MeshAxes()), hardware)


def test_a_chip_under_another_name_can_be_allowed_by_it() -> None:
    hardware = HardwareConfig("it", Platform.cpu, device_kind="card", num_devices=8)
    with pytest.raises(MeshError, match="or 'hardware.device_kind=\"cpu\"' if that is as fast;"):
        make_mesh(MeshConfig(ici=MeshAxes()), hardware)


def test_a_rehearsal_takes_virtual_devices_for_others() -> None:
    hardware = HardwareConfig(
        name="tpu_v4_16",
        platform=Platform.tpu,
        device_kind="TPU v4",
        num_devices=8,
        num_hosts=2,
        simulate=True,
    )
    hsdp = MeshConfig(ici=MeshAxes(data=1, fsdp=-1), dcn=DcnAxes(data=-1))
    assert make_mesh(hsdp, hardware).devices.shape == (2, 4, 1)
