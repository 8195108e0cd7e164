"""A run that trains its text encoder: it goes on as if never stopped, and draws with what it
learned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import sdx
from sdx.record.paths import RunPaths
from sdx.training.checkpoint import restore_params
from sdx.training.pictures import make_grid, to_uint8
from sdx.weights.load import load_text_encoder
from sdx.weights.model_files import open_model
from tests.experiment.conftest import MICRO, Command

STEPS = 4
PROMPT = next(text for text in MICRO if "prompts" in text).split("[")[1].rstrip("]")
RESCALE = 0.7
RUN = [
    "train.text_encoder=true",
    "optimizer.text_encoder_lr=0.05",  # four steps must show in a picture
    "checkpoint.every=2",
    "export.at_end=false",
    "metrics.sinks=[jsonl]",
    f"sample.guidance_rescale={RESCALE}",
    "run.name=run",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    command = Command(tmp_path_factory.mktemp("whole"))
    code, output = command.run(*RUN, f"train.max_steps={STEPS}")
    assert code == 0, output
    return command.path("run")


def weights(run: Path, which: Any) -> dict[str, Any]:
    return restore_params(RunPaths(run).checkpoints, which, say=print)[1]


def test_it_goes_on_to_the_last_bit(
    whole: Path, command: Command, rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    assert command.run(*RUN, "sample.every=null", "train.max_steps=2")[0] == 0
    code, output = command.run(*RUN, "sample.every=null", f"train.max_steps={STEPS}")
    assert code == 0 and "continuing from step 2" in output, output
    run = command.path("run")
    assert rows(run) == rows(whole)
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lr_text_encoder"] == pytest.approx(0.05)
    for which in ("params", "ema"):
        there, here = weights(whole, which), weights(run, which)
        assert there.keys() == {"unet", "text_encoder"}
        jax.tree.map(np.testing.assert_array_equal, there, here)


def test_it_draws_with_what_it_learned(whole: Path) -> None:
    """The grid in the run is that of `sdx.load`, which another text encoder does not draw."""
    pipeline = sdx.load(whole)
    average = weights(whole, "ema")["text_encoder"]
    jax.tree.map(np.testing.assert_array_equal, pipeline.params["text_encoder"], average)
    (grid,) = (np.asarray(Image.open(path)) for path in (whole / "samples").glob("0*.png"))

    def difference(pipeline: sdx.Pipeline) -> int:
        options = {"num_steps": 2, "guidance_scale": 3.0, "guidance_rescale": RESCALE}
        images = pipeline.sample([PROMPT], seed=0, **options)
        drawn = make_grid(to_uint8(images), [PROMPT]).astype(int)
        return np.abs(drawn - grid).max()

    assert difference(pipeline) <= 2
    untrained = load_text_encoder(
        open_model("tiny", components=["text_encoder"]), pipeline.params["text_encoder"]
    )
    assert difference(pipeline.with_params({"text_encoder": untrained})) > 8
