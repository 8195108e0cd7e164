"""Devices that are described otherwise than their preset says are told, with what differs."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from sdx.config.schema import HardwareConfig, Platform
from sdx.planning import topology
from sdx.planning.gpu_target import gpu_target
from sdx.planning.topology import (
    ENVIRONMENT,
    CompilerMissing,
    TopologyError,
    check_described,
    described_devices,
    has_compiler,
)
from tests.config.quick import quick
from tests.conftest import require

V4 = HardwareConfig(
    name="v4",
    platform=Platform.tpu,
    device_kind="TPU v4",
    num_devices=16,
    num_hosts=4,
    topology="v4:2x2x4",
    chip_config="megacore",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What libtpu is told does not outlast the test."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
    yield


@pytest.fixture
def libtpu() -> None:
    require(has_compiler(Platform.tpu), "libtpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chip_config": None}, ["num_devices=16: described are 32"]),
        ({"num_slices": 2}, ["num_devices=16: described are 32", "num_hosts=4: described are 8"]),
        ({"chips_per_host": [2, 2, 2]}, ["num_hosts=4: described are 2"]),
        ({"device_kind": "TPU v5"}, ["device_kind=TPU v5: described are TPU v4"]),
        ({"topology": "v4:2x2x2"}, ["num_devices=16: described are 8"]),
    ],
)
def test_another_description_than_the_numbers(
    change: dict[str, object], said: list[str], libtpu: None
) -> None:
    with pytest.raises(TopologyError) as found:
        described_devices(replace(V4, **change))  # type: ignore[arg-type]
    assert all(f"  hardware.{line}\n" in str(found.value) for line in said)


def test_a_name_that_libtpu_refuses(libtpu: None) -> None:
    with pytest.raises(TopologyError, match=r"topology=v4:3x5x7: libtpu refuses it .* v4:2x2x4"):
        described_devices(replace(V4, topology="v4:3x5x7"))


@pytest.mark.fast
def test_what_must_be_given_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TopologyError, match=r"topology: missing, hardware=v4 .* as v4:2x2x4"):
        check_described(replace(V4, topology=None))
    with pytest.raises(TopologyError, match=r"num_devices: missing, .* hardware\.num_devices=N"):
        check_described(replace(V4, num_devices=None))
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match=r"not installed; pip install 'sdx\[plan\]'"):
        described_devices(V4)


@pytest.mark.fast
def test_a_gpu_in_xlas_words() -> None:
    hardware = quick(["hardware=gpu_a100_8"]).hardware
    text = gpu_target(hardware)
    for line in (
        "cuda_compute_capability { major: 8 minor: 0 }",
        "core_count: 108\n",
        "memory_bandwidth: 2039000000000\n",
        f"device_memory_size: {80 * 2**30}\n",
        f'device_description_str: "{hardware.device_kind}"\n',
    ):
        assert line in text
    with pytest.raises(TopologyError, match="device_kind=Abacus: .*; allowed: NVIDIA H100"):
        gpu_target(replace(hardware, device_kind="Abacus"))
