"""What each experiment comes to on each hardware it makes sense on, as it was when last looked at.

`python -m tests.config.test_golden` writes the files again; read the diff before committing it.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdx.config.compose import compose
from sdx.config.folders import CONF, group_options
from sdx.config.leaves import flatten

FOLDER = Path(__file__).parent / "golden"
HARDWARE = group_options([CONF])["hardware"]
LARGE = ["gpu_24gb_1", "gpu_24gb_2", "gpu_h100_8", "tpu_v4_32", "tpu_v5e_8"]
SENSIBLE = {
    "base": ([], HARDWARE),
    "shapes_epsilon": (["experiment=shapes_epsilon"], ["cpu", "gpu_24gb_1"]),
    "diffusers_pokemon": (["experiment=diffusers_pokemon"], LARGE),
    "diffusers_pokemon_24gb": (["experiment=diffusers_pokemon_24gb"], ["gpu_24gb_1"]),
    "maxdiffusion_sd21": (["experiment=maxdiffusion_sd21"], LARGE),
    "mlperf_sd2": (["experiment=mlperf_sd2", "data.dir=shards"], ["gpu_h100_8", "gpu_h100_8x8"]),
    "finetune_sd21": (["experiment=finetune_sd21", "data.dir=photos"], LARGE),
}


@cache
def base_values() -> dict[str, Any]:
    return flatten(compose([]))


def differing(overrides: list[str]) -> dict[str, Any]:
    """Leaves of the composed configuration that differ from the base configuration."""
    base = base_values()
    values = flatten(compose(overrides))
    return {path: value for path, value in values.items() if value != base[path]}


def composed(name: str) -> dict[str, dict[str, Any]]:
    overrides, hardware = SENSIBLE[name]
    return {option: differing([*overrides, f"hardware={option}"]) for option in hardware}


@pytest.mark.parametrize("name", SENSIBLE)
def test_golden(name: str) -> None:
    golden = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert composed(name) == golden, "if this is meant: python -m tests.config.test_golden"


def test_every_experiment_is_covered() -> None:
    assert set(SENSIBLE) == {"base", *group_options([CONF])["experiment"]}
    assert {file.stem for file in FOLDER.iterdir()} == set(SENSIBLE)


if __name__ == "__main__":
    for name in SENSIBLE:
        (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(composed(name), sort_keys=False))
