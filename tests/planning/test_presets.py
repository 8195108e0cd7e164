"""libtpu describes the chips of every TPU preset as the preset says they are."""

from typing import Any

import pytest

from sdx.config.folders import CONF
from sdx.config.schema import HardwareConfig
from sdx.planning.topology import ENVIRONMENT, described_devices, has_compiler
from tests.config.quick import quick
from tests.config.test_hardware_page import chips
from tests.conftest import require

PRESETS = sorted(file.stem for file in (CONF / "hardware").glob("tpu_*.yaml"))
ASKED = {
    *("tpu_v3_8", "tpu_v4_8", "tpu_v4_32", "tpu_v4_128", "tpu_v5e_8", "tpu_v5e_32"),
    *("tpu_v5p_8", "tpu_v5p_32", "tpu_v6e_8", "tpu_v6e_32"),
    *("tpu_v4_32x2", "tpu_v5e_32x2", "tpu_v5p_32x2", "tpu_v6e_32x2"),
}


@pytest.fixture
def libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler, and the environment as it was afterwards."""
    hardware = quick(["hardware=tpu_v4_8"]).hardware
    require(has_compiler(hardware.platform), "libtpu")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.fast
def test_the_presets_are_all_there() -> None:
    assert set(PRESETS) == ASKED


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_libtpu_describes(name: str, libtpu: None) -> None:
    hardware = quick([f"hardware={name}"]).hardware
    devices = described_devices(hardware)
    assert counted(devices) == said(name, hardware)


def counted(devices: Any) -> dict[str, Any]:
    """What the descriptions of single devices come to."""
    places = [(getattr(device, "slice_index", 0), *device.coords) for device in devices]
    return {
        "devices": len(devices),
        "chips": len(set(places)),
        "hosts": len({device.process_index for device in devices}),
        "slices": len({place[0] for place in places}),
        "kinds": {device.device_kind for device in devices},
    }


def said(name: str, hardware: HardwareConfig) -> dict[str, Any]:
    return {
        "devices": hardware.num_devices,
        "chips": chips(name),
        "hosts": hardware.num_hosts,
        "slices": hardware.num_slices,
        "kinds": {hardware.device_kind},
    }
