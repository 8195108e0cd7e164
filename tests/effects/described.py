"""`hardware.topology`, `chip_config`, `chips_per_host`, `num_slices`: what libtpu is asked to
describe, which sdx.plan compile=true then compiles for."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from sdx.planning import topology
from sdx.planning.topology import ENVIRONMENT, TopologyError, described_devices
from tests.effects.effect import Case, Effect

V4 = (
    "hardware.platform=tpu",
    "hardware.num_devices=8",
    "hardware.topology=v4:2x2x2",
    "mesh=dp",
    "train.global_batch_size=8",
)


def asked(case: Case) -> dict[str, Any]:
    """What libtpu hears; it answers with one device, which the numbers then do not agree with."""
    heard: dict[str, Any] = {}

    def describe(name: str, platform: str, **given: Any) -> SimpleNamespace:
        heard.update({"topology_name": name, **given})
        device = SimpleNamespace(process_index=0, device_kind="none")
        return SimpleNamespace(devices=[device])

    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, "")
        patch.setattr(topology, "has_compiler", lambda platform: True)
        patch.setattr(topology.topologies, "get_topology_desc", describe)
        with suppress(TopologyError):
            described_devices(case.config.hardware)
    return heard


PLAIN = {"topology_name": "v4:2x2x2"}
EFFECTS = [
    Effect("hardware.topology", "v5e:2x4", asked, PLAIN, {"topology_name": "v5e:2x4"}, given=V4),
    Effect(
        "hardware.chip_config",
        "megacore",
        asked,
        PLAIN,
        PLAIN | {"chip_config_name": "megacore"},
        given=V4,
    ),
    Effect(
        "hardware.chips_per_host",
        "[2,2,2]",
        asked,
        PLAIN,
        PLAIN | {"chips_per_host_bounds": (2, 2, 2)},
        given=V4,
    ),
    Effect(
        "hardware.num_slices",
        "2",
        asked,
        PLAIN,
        PLAIN | {"num_slices": 2},
        given=(*V4, "hardware.num_hosts=2"),
        along=("mesh.dcn.data=2",),
    ),
]
