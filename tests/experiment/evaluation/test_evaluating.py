"""`sdx.evaluate` on a run: the loss that training noted, and pictures drawn for their scores."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdx.evaluate import main
from sdx.experiment.evaluation.request import EvaluationError, Kind, Request, check_request
from tests.clip_folder import make_clip
from tests.experiment.test_validating import MEASURED, start, validation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that measured its last."""
    return start(tmp_path_factory.mktemp("trained"), *MEASURED, "train.max_steps=3")[1]


def evaluated(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_the_loss_is_the_one_training_noted(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On eight devices, in batches of another size."""
    assert main([str(trained), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    noted = validation(trained)[-1]
    assert row["validation_loss"] == pytest.approx(noted["validation_loss"], rel=1e-5)
    by_bucket = [noted[f"validation_loss_{k}"] for k in range(4)]
    assert row["validation_loss_of"]["by_bucket"] == pytest.approx(by_bucket, rel=1e-5)
    assert row["model"]["step"] == 3 and row["model"]["weights"] == "ema"
    assert evaluated(trained)[-1] == row


def test_options_take_the_place_of_the_runs_own(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weights", "raw", "--split", "train", "--num-batches", "2", "--step", "3"]
    assert main([str(trained), *options]) == 0
    output = capsys.readouterr()
    row = evaluated(trained)[-1]
    assert row["model"]["weights"] == "raw" and row["validation_loss_of"]["num_examples"] == 8
    assert row["validation_loss"] != validation(trained)[-1]["validation_loss"]
    assert "trained on these very examples" in output.err
    assert "(8 examples of train)" in output.out and "  t 750-999" in output.out


def test_pictures_are_drawn_scored_and_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    command = [str(trained), "--clip", str(tmp_path / "clip"), "--adherence", "8", "--steps", "2"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "8"]
    assert main(command) == 0
    row = evaluated(trained)[-1]
    folder = Path(row["pictures"]["folder"])
    assert folder.parent == trained / "samples" and len(list(folder.glob("*.png"))) == 2
    assert row["adherence"]["count"] == 8 and row["clip_score_of"]["count"] == 2
    assert row["drawing"]["settings"]["num_steps"] == 2
    assert "CLIP score" in capsys.readouterr().out


def test_what_is_not_there_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "evaluation.jsonl").read_text()
    for argv, said in (
        ([str(trained), "--step", "2"], "no valid checkpoint 2; steps there: 3"),
        ([str(trained), "--split", "nope"], "--split nope: cannot be opened"),
        ([f"{trained}@3", "--step", "3"], "says it; leave it out"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err
    assert (trained / "evaluation.jsonl").read_text() == before


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (Kind.pictures, {}, ["has no validation loss"]),
        (Kind.model, {}, ["has no validation loss"]),
        (Kind.run, {"fid": Path("real")}, ["--fid: needs --inception", "--prompts: missing"]),
        (Kind.run, {"inception": Path("x")}, ["--inception: needs --fid REFERENCE"]),
        (Kind.run, {"steps": 3, "out": Path("o")}, ["--steps: is about", "--out: is about"]),
        (Kind.run, {"adherence": 3, "split": "train"}, ["--split: is about the validation loss"]),
        (Kind.run, {"model": "sd21"}, ["--model: says what an original"]),
        (
            Kind.pictures,
            {"clip": Path("c"), "prompts": Path("p"), "seed": 1, "weights": "raw"},
            [
                "3 faults",
                "--prompts: needs",
                "--seed: needs a run",
                "--weights: needs a run of sdx",
            ],
        ),
    ],
)
def test_all_that_does_not_go_together_is_said_at_once(
    kind: Kind, options: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(EvaluationError) as caught:
        check_request(Request("source", **options), kind)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.fast
def test_what_goes_together_is_taken() -> None:
    check_request(Request("run"), Kind.run)
    check_request(Request("pictures", clip=Path("c")), Kind.pictures)
    check_request(Request("run", adherence=3, steps=4), Kind.run)
    saved = Request("pictures", inception=Path("i"), save_statistics=Path("s"))
    check_request(saved, Kind.pictures)
    check_request(Request("model", clip=Path("c"), prompts=Path("p"), model="sd21"), Kind.model)
