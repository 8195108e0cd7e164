"""The table of presets in docs/hardware.md is what conf/hardware says.

`python -m tests.config.test_hardware_page` writes it again.
"""

import math
import re
from functools import cache

import pytest
import yaml

from sdx.config.folders import CHECKOUT, CONF
from sdx.config.schema import HardwareConfig
from tests.config.quick import quick

assert CHECKOUT is not None
PAGE = CHECKOUT / "docs" / "hardware.md"
BEGIN, END = "<!-- presets -->\n", "<!-- /presets -->"
HEAD = (
    "Preset", "Chips", "JAX devices", "Hosts", "Slices", "Device kind", "HBM, GiB", "GB/s",
    "TFLOP/s", "Host memory, GiB", "Mesh", "Flags", "Source",
)  # fmt: skip
BARE = ("cpu", "gpu", "tpu")
FILES = {file.stem: file.read_text() for file in (CONF / "hardware").glob("*.yaml")}


def table() -> str:
    """Every preset that names chips, by platform, generation and size."""
    rows = [HEAD, ("---",) * len(HEAD), *map(row, sorted(set(FILES) - set(BARE), key=order))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


@cache
def preset(name: str) -> HardwareConfig:
    return quick([f"hardware={name}"]).hardware


def order(name: str) -> list[str]:
    return [part.zfill(8) for part in re.split(r"[_x]", name)]


def row(name: str) -> tuple[str, ...]:
    hardware = preset(name)
    chosen = {
        group.removeprefix("override /"): option
        for entry in yaml.safe_load(FILES[name])["defaults"]
        for group, option in entry.items()
    }
    numbers = [
        chips(name), hardware.num_devices, hardware.num_hosts, hardware.num_slices,
        hardware.device_kind, hardware.hbm_gib, hardware.hbm_gbps, hardware.peak_tflops,
        hardware.host_memory_gib,
    ]  # fmt: skip
    shown = [f"{number:g}" if isinstance(number, int | float) else number for number in numbers]
    cells = [cell or "" for cell in shown]
    return (f"`{name}`", *cells, f"`{chosen['mesh']}`", f"`{chosen['xla']}`", source(name))


def chips(name: str) -> int:
    """Of the topology, where there is one; JAX's devices are cores on some."""
    hardware = preset(name)
    if hardware.topology is None:
        return hardware.num_devices or 0
    sizes = hardware.topology.partition(":")[2].split("x")
    return math.prod(map(int, sizes)) * hardware.num_slices


def source(name: str) -> str:
    """The page that the first line of a file names; every file with numbers has one."""
    [found] = re.findall(r"^# Source: (.*?):", FILES[name], re.MULTILINE)
    return found


def test_the_page_shows_the_presets() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), "if this is meant: python -m tests.config.test_hardware_page"


@pytest.mark.fast
def test_the_page_names_every_set_of_flags() -> None:
    told = PAGE.read_text().partition("## Compiler flags")[2]
    sets = {file.stem for file in (CONF / "xla").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE)) == sets


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
