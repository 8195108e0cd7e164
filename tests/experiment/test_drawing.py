"""`sdx.sample`: what is not asked for is the run's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdx.config.compose import compose, to_yaml
from sdx.experiment import drawing

pytestmark = pytest.mark.fast


class Asked:
    """A pipeline that keeps what it is asked for."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def sample(self, prompts: list[str], **options: Any) -> np.ndarray:
        self.options = options
        return np.zeros((len(prompts), 8, 8, 3), np.float32)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    pipeline = Asked()
    monkeypatch.setattr(drawing, "load", lambda source, **_: pipeline)
    return pipeline


def draw(source: Path, **options: Any) -> None:
    unsaid: dict[str, Any] = dict.fromkeys(
        ("negative_prompt", "num_steps", "guidance_scale", "sampler", "model")
    )
    unsaid |= {"num_images": 1, "seed": 0, "out": source / "drawn"}
    drawing.draw(str(source), ["a red circle"], **(unsaid | options))


def test_a_run_draws_as_its_grids_are_drawn(asked: Asked, tmp_path: Path) -> None:
    own = {"num_steps": 7, "guidance_scale": 4.5, "guidance_rescale": 0.6}
    config = compose([*(f"sample.{key}={n}" for key, n in own.items()), "sample.negative_prompt=x"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    draw(tmp_path)
    assert own.items() <= asked.options.items()
    assert asked.options["negative_prompts"] == ["x"]
    draw(tmp_path, num_steps=3, guidance_scale=2.0, negative_prompt="", sampler="euler")
    said = {"num_steps": 3, "guidance_scale": 2.0, "negative_prompts": [""], "sampler": "euler"}
    assert said.items() <= asked.options.items()
