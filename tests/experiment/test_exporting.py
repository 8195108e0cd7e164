"""A run's own export and upload, what may go wrong with them, and the command that makes more."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import sdx
from sdx.config.compose import from_saved
from sdx.experiment.exporting import is_export_due
from sdx.export import main
from sdx.record.paths import RunPaths
from sdx.record.redact import MASK
from tests.experiment.conftest import Command
from tests.experiment.hub_uploads import COMMIT, HubUploads

TOKEN = "canary-4f1d09"
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
RUN = [
    "train.text_encoder=true",
    "checkpoint.every=2",
    "run.name=run",
    f"sample.prompts=[a small red circle {SECRET}]",
]
UPLOAD = ["export.push_to_hub=true", "export.hub_model_id=me/model"]
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


@dataclass(frozen=True)
class Story:
    """A run whose export fails, that goes on and is uploaded, and whose export is then lost."""

    run: Path
    hub: HubUploads
    failed: tuple[int, str]
    failed_status: dict[str, Any]
    uploaded: tuple[int, str]
    requests: list[str]
    completed: tuple[int, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with HubUploads(TOKEN, failures={"/commit/main": [503]}) as hub:
        command = Command(tmp_path_factory.mktemp("story"), hub.environment())
        run = command.path("run")
        mine = run / "export" / "notes.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        failed = command.run(*RUN, "train.max_steps=2")
        assert (run / "status.json").is_file(), failed[1]
        failed_status = json.loads((run / "status.json").read_text())
        assert mine.read_text() == "mine"
        mine.unlink()
        (run / ".export.tmp" / "unet").mkdir(parents=True)  # as a kill leaves it
        uploaded = command.run(*RUN, *UPLOAD, "train.max_steps=4")
        requests = list(hub.requests)
        shutil.rmtree(run / "export")
        completed = command.run(*RUN, "train.max_steps=4")
        yield Story(run, hub, failed, failed_status, uploaded, requests, completed)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def export(source: Path | str, folder: Path, *options: str) -> int:
    return main([str(source), "--out", str(folder), *options])


def test_a_failed_export_loses_nothing(story: Story) -> None:
    code, output = story.failed
    assert code == 1 and "Traceback" not in output
    assert "all 2 steps are done, but not the export" in output and "notes.txt" in output
    assert story.failed_status["status"] == "failed" and story.failed_status["step"] == 2
    assert (story.run / "checkpoints" / "2" / "manifest.json").is_file()
    code, output = story.uploaded
    assert code == 0 and "continuing from step 2" in output


def test_a_run_is_uploaded_at_its_end(story: Story) -> None:
    code, output = story.uploaded
    assert code == 0, output
    address = f"{story.hub.address}/me/model/commit/{COMMIT}"
    assert f"uploaded: {address}" in output
    assert len(re.findall(r"upload to me/model: .*503.*; again in 2 s", output)) == 1
    assert [line.split()[-1] for line in story.requests if "/commit/" in line] == ["503", "200"]
    record = json.loads((story.run / "run.json").read_text())
    assert record["uploaded"] == {"hub_model_id": "me/model", "step": 4, "commit": address}
    there = story.hub.repositories["me/model"]
    here = files(story.run / "export")
    assert there.keys() == here.keys()
    assert there[UNET] == here[UNET] and there[TEXT_ENCODER] == here[TEXT_ENCODER]
    assert b'from_pretrained("me/model"' in there["README.md"]


def test_a_finished_run_makes_up_for_its_export(story: Story) -> None:
    code, output = story.completed
    assert code == 0 and "is finished" in output and "exported: " in output
    assert files(story.run / "export")[UNET] == story.hub.repositories["me/model"][UNET]
    assert json.loads((story.run / "status.json").read_text())["status"] == "finished"
    assert not list(story.run.glob(".export*"))


def test_what_a_finished_run_owes(story: Story) -> None:
    paths, config = RunPaths(story.run), from_saved(story.run)
    pushed = replace(config.export, push_to_hub=True, hub_model_id="me/model")
    elsewhere = replace(pushed, hub_model_id="you/model")
    off = replace(config.export, at_end=False)
    for settings, step, is_due in (
        (config.export, 4, False), (config.export, 5, True), (pushed, 4, False),
        (elsewhere, 4, True), (off, 5, False),
    ):  # fmt: skip
        assert is_export_due(paths, replace(config, export=settings), step) == is_due


def test_no_token_is_anywhere(story: Story) -> None:
    said = [story.failed[1], story.uploaded[1], story.completed[1]]
    kept = [*files(story.run).values(), *story.hub.repositories["me/model"].values()]
    assert not any(TOKEN in text for text in said)
    assert not any(TOKEN.encode() in content for content in kept)
    assert not any(SECRET.encode() in content for content in files(story.run / "export").values())


def test_the_card_tells_what_it_is(story: Story) -> None:
    card = (story.run / "export" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    described = yaml.safe_load(head)
    assert described["library_name"] == "diffusers" and "base_model" not in described
    for told in (
        "# run\n",
        "a UNet trained from random weights and a text encoder trained from `tiny`",
        "averaged weights (EMA) after 4 steps of 4 images of 64 x 64 pixels",
        "transformers 5.6",
        "(samples.png)",
        "| train.text_encoder | true |",
        "| diffusion.prediction_type | v_prediction |",
        f'pipe("a small red circle {MASK}", num_inference_steps=2',
        "| jax | ",
        "loss, mean of the last 4 rows",
    ):
        assert told in text
    assert str(story.run.parent) not in card
    picture = story.run / "samples" / "0000004.png"
    assert (story.run / "export" / "samples.png").read_bytes() == picture.read_bytes()


def test_checkpoints_are_exported_as_asked(story: Story, tmp_path: Path) -> None:
    assert export(story.run, tmp_path / "ema") == 0
    assert export(story.run, tmp_path / "raw", "--weights", "raw") == 0
    assert export(story.run, tmp_path / "early", "--step", "2", "--dtype", "bfloat16") == 0
    at_end = files(story.run / "export")
    ema, raw, early = (files(tmp_path / name) for name in ("ema", "raw", "early"))
    assert (ema[UNET], ema[TEXT_ENCODER]) == (at_end[UNET], at_end[TEXT_ENCODER])
    assert raw[UNET] != ema[UNET] and raw[TEXT_ENCODER] != ema[TEXT_ENCODER]
    assert "samples.png" in early and "samples.png" not in raw  # pictures are of the average
    assert len(early[UNET]) < 0.6 * len(ema[UNET])
    assert b"after 2 steps" in early["README.md"] and b"torch.bfloat16" in early["README.md"]
    record = json.loads(raw["sdx.json"])
    assert (record["step"], record["weights"], record["dtype"]) == (4, "raw", "float32")


def test_a_trained_text_encoder_is_the_one_torch_loads(story: Story) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch: Any = pytest.importorskip("torch")
    with warnings.catch_warnings(action="ignore"):
        theirs = transformers.CLIPTextModel.from_pretrained(story.run / "export" / "text_encoder")
    pipe, untrained = sdx.load(story.run), sdx_tiny_text_encoder()
    tokens = pipe.tokenize(["a large blue square", ""])
    with torch.no_grad():
        states = theirs(torch.tensor(tokens).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(pipe.encode_text(tokens), states, atol=1e-5)
    trained = load_file(story.run / "export" / TEXT_ENCODER)
    assert trained.keys() == untrained.keys()
    assert any((trained[name] != untrained[name]).any() for name in trained)


def sdx_tiny_text_encoder() -> dict[str, np.ndarray]:
    """What the text encoder was before it was trained."""
    return load_file(Path(sdx.__file__).parent / "assets" / "tiny" / TEXT_ENCODER)


def test_diffusers_is_asked_and_believed(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    assert export(story.run, tmp_path / "good", "--verify") == 0
    said = re.search(
        r"diffusers draws the same picture, within (\S+) of 255", capsys.readouterr()[0]
    )
    assert said and float(said[1]) < 0.1

    pipeline = import_module("sdx.pipeline")
    truth = pipeline.scheduler_config
    lie = {"prediction_type": "epsilon"}
    monkeypatch.setattr(pipeline, "scheduler_config", lambda *given: truth(*given) | lie)
    assert export(story.run, tmp_path / "bad", "--verify") == 1
    assert "differs by" in capsys.readouterr()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--step", "3"], "no valid checkpoint 3; steps there: 2, 4"),
        (["--verify", "--dtype", "float16"], "verify with --dtype float32"),
        (["--push-to-hub", "model"], "model: not a repository of the Hub; give OWNER/NAME"),
    ],
)
def test_what_cannot_be_done_is_refused(
    story: Story, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], reason: str
) -> None:
    assert export(story.run, tmp_path / "out", *options) == 2
    assert reason in capsys.readouterr()[1]
    assert not list(tmp_path.iterdir())


def test_strange_sources_and_folders_are_refused(
    story: Story, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert export(story.run, tmp_path) == 2
    assert "holds what sdx did not export (mine)" in capsys.readouterr()[1]
    assert export("tiny", tmp_path / "out", "--step", "3") == 2
    assert "tiny is not a run of sdx" in capsys.readouterr()[1]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert export(story.run, tmp_path / "out", "--push-to-hub", "me/model") == 2
    assert "no token to upload with" in capsys.readouterr()[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export(story.run, tmp_path / "out", "--verify") == 2
    assert "torch and diffusers and transformers not installed" in capsys.readouterr()[1]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
