"""What a run measures while it trains: noted once a step, of the average, whatever interrupts it.

The runs here are of this process: the command itself and real kills are test_resume's.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdx.config.compose import compose
from sdx.data.source import DataError
from sdx.data.sources.open import open_source
from sdx.experiment.attempt import Attempt
from sdx.experiment.run import run
from sdx.experiment.setup import prepare
from sdx.experiment.validating import continue_history, named_step, open_validation
from sdx.parallel.mesh import make_mesh
from sdx.record.paths import RunPaths
from sdx.record.run import start as begin
from sdx.record.status import Status
from sdx.record.validation import ValidationHistory, best_checkpoint, read_history
from sdx.training.checkpoint import Checkpointer, NoValidCheckpoint, restore_params
from sdx.training.evaluation import Evaluator, evaluation_data, make_evaluator
from sdx.training.program import Program, build
from sdx.training.sinks import JsonlSink
from sdx.weights.load import LOADERS
from tests.conftest import REPOSITORY
from tests.experiment.conftest import MICRO
from tests.experiment.test_resume import arrays
from tests.training.test_profile import steps_in

STEPS = 9
RUN = [
    *MICRO,
    f"train.max_steps={STEPS}",
    "checkpoint.every=3",
    "checkpoint.keep=2",
    "sample.every=null",
    "export.at_end=false",
    "metrics.sinks=[jsonl]",
    f"run.compilation_cache_dir={REPOSITORY / '.pytest_cache' / 'xla'}",
]
MEASURED = ["eval.every=3", "eval.num_batches=4", "eval.num_buckets=4"]


def start(folder: Path, *overrides: str) -> tuple[int, Path]:
    """Exit code and folder of a run."""
    typed = [*RUN, *overrides, f"run.output_dir={folder}", "run.name=run"]
    return run(compose(typed), typed), folder / "run"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def training(path: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in rows(path) if "loss" in r]


def validation(path: Path) -> list[dict[str, float]]:
    return [row for row in rows(path) if "validation_loss" in row]


def record(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())["validation"]


def saved(path: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (path / "checkpoints").iterdir())


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    """The runs here differ in what is measured and when they end: one program does for all."""
    jax.devices()  # the eight of the tests, before a run asks for one
    programs: list[Program] = []
    compile_program = vars(Attempt)["_compile"]

    def compiled(attempt: Attempt) -> Program:
        programs[:] = programs or [compile_program(attempt)]
        return programs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attempt, "_compile", compiled)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, traced on the way."""
    traced = ["profiler.enabled=true", "profiler.skip_steps=1", "profiler.steps=2"]
    code, path = start(tmp_path_factory.mktemp("measured"), *MEASURED, *traced)
    assert code == 0
    return path


def test_measuring_and_tracing_change_no_bit_of_training(measured: Path, tmp_path: Path) -> None:
    code, plain = start(tmp_path)
    assert code == 0 and validation(plain) == []
    assert training(plain) == training(measured) and len(training(plain)) == STEPS
    there, here = arrays(plain, STEPS), arrays(measured, STEPS)
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    assert "validation" not in json.loads((plain / "run.json").read_text())
    assert not (plain / "profile").exists()
    [trace] = (measured / "profile" / "1").glob("plugins/profile/*/*.xplane.pb")
    assert steps_in(str(trace)) == [2, 3]
    assert b"train_step" in trace.read_bytes()


def test_rows_and_record_say_the_same(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = validation(measured)
    assert [row["step"] for row in found] == [3, 6, 9]
    names = ["step", "validation_loss", *(f"validation_loss_{k}" for k in range(4))]
    assert all([*row] == names for row in found)
    losses = {str(row["step"]): row["validation_loss"] for row in found}
    kept = record(measured)
    assert kept["losses"] == losses and kept["last"] == losses["9"] and kept["step"] == 9
    assert kept["best"] == min(losses.values()) == losses[str(kept["best_step"])]
    log = (measured / "log.txt").read_text()
    assert f"step 9: validation loss {losses['9']:.4f}" in log
    assert (measured / "loss.png").is_file()


def test_the_average_is_measured(measured: Path) -> None:
    typed = [*RUN, *MEASURED, f"run.output_dir={measured.parent}", "run.name=run"]
    setup = prepare(compose(typed))
    config = setup.config
    program = build(config, make_mesh(config.mesh, config.hardware), max_steps=STEPS)
    abstract = program.abstract_frozen
    frozen = program.place_frozen(
        **{name: LOADERS[name](setup.weights, like) for name, like in abstract.items()}
    )
    assert setup.validation is not None
    evaluator = make_evaluator(
        program,
        frozen,
        setup.validation,
        setup.tokenizer,
        evaluation_data(config.data, config.eval.split),
        resolution=64,
        num_examples=16,
        num_buckets=4,
    )
    said = {}
    for which in ("ema", "params"):
        _, params = restore_params(RunPaths(measured).checkpoints, which, step=6, say=print)
        loss = evaluator(program.init(**params).params)
        assert loss is not None
        said[which] = loss.loss
    noted = record(measured)["losses"]["6"]
    assert said["ema"] == noted and abs(said["params"] - noted) > 1e-4


def test_interruptions_leave_one_row_a_step(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, write = Evaluator.__call__, JsonlSink.write

    def interrupted(self: Evaluator, params: Any, should_stop: Callable[[], bool]) -> Any:
        if calls.append(0) or len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while not should_stop():  # the watcher thread reads the signal
                pass
        return measure(self, params, should_stop)

    def failing(self: JsonlSink, step: int, values: Any) -> None:
        if step == 8:
            raise RuntimeError("the disk is full")
        write(self, step, values)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", interrupted)
        code, path = start(tmp_path, *MEASURED, "checkpoint.keep_best=1")
    assert code == 75 and [row["step"] for row in validation(path)] == [3]
    assert saved(path) == [3, 6] and record(path)["step"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(JsonlSink, "write", failing)
        assert start(tmp_path, *MEASURED)[0] == 1
    assert record(path)["step"] == 6
    assert start(tmp_path, *MEASURED)[0] == 0
    assert validation(path) == validation(measured)
    assert training(path) == training(measured) and record(path) == record(measured)


def test_a_checkpoint_that_is_the_best_stays(tmp_path: Path) -> None:
    history = ValidationHistory("x", {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.5, 5: 9.0})
    checkpointer = Checkpointer(
        tmp_path / "checkpoints", keep=2, say=print, best=lambda steps: history.best(steps, 2)
    )
    with closing(checkpointer):
        for step in range(1, 7):
            checkpointer.save(step, {"step": jnp.int32(step)})
            history.losses[step] = history.losses.get(step, 8.0)
        checkpointer.wait()
        assert checkpointer.steps() == [2, 4, 5, 6]
        newest = checkpointer.restore({"step": like(jnp.int32(0))})
        assert newest is not None and newest[0] == 6
    (tmp_path / "run.json").write_text(json.dumps({"validation": history.fields()}))
    paths = RunPaths(tmp_path)
    assert best_checkpoint(paths) == named_step(paths, "best") == 2
    assert named_step(paths, 12) == 12 and named_step(paths, None) is None
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(NoValidCheckpoint, match="none is the best"):
        named_step(paths, "best")


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def test_the_best_checkpoint_can_be_forked(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = record(measured)["best_step"]
    code, forked = start(tmp_path, f"run.resume_from={measured}@best", f"train.max_steps={best}")
    assert code == 0
    assert json.loads((forked / "run.json").read_text())["parent"] == f"{measured}@{best}"
    code, _ = start(tmp_path / "other", f"run.resume_from={forked}@best")
    assert code == 2 and "none of its checkpoints was measured" in capsys.readouterr().err


@pytest.mark.fast
def test_losses_of_other_examples_are_not_compared(tmp_path: Path) -> None:
    paths, said = RunPaths(tmp_path), []
    noted = begin(paths, config_yaml="", config={}, overrides=[], resume="auto", max_steps=9)
    for of, first_step, kept in (("x", 9, [3, 6, 9]), ("x", 6, [3, 6]), (None, 6, [3, 6])):
        history = ValidationHistory("x", {3: 1.0, 6: 2.0, 9: 3.0})
        continue_history(history, noted, of, first_step, said.append)
        assert [*history.losses] == kept == [*read_history(paths.run).losses] and not said
    continue_history(history, noted, "y", 6, said.append)
    assert not history.losses and read_history(paths.run).of == "y" and "other examples" in said[0]
    noted.finish(Status.finished)


@pytest.mark.fast
def test_history_knows_the_best_of_what_is_there(tmp_path: Path) -> None:
    history = ValidationHistory("x", {1: 3.0, 2: float("nan"), 3: 1.0, 4: 1.0, 5: 2.0})
    assert history.best([1, 2, 3, 4, 5, 6], 3) == [3, 4, 5]
    assert history.best([2, 6]) == []
    (tmp_path / "run.json").write_text(json.dumps({"validation": history.fields()}))
    again = read_history(tmp_path / "run.json")
    again.cut_after(4)
    assert list(again.losses) == [1, 2, 3, 4] and np.isnan(again.losses[2]) and again.of == "x"
    assert again.fields()["last"] == 1.0 and again.fields()["best_step"] == 3
    assert read_history(tmp_path / "none.json").fields()["best"] is None


def folder_of_images(root: Path, folders: dict[str, range]) -> Path:
    for name, numbers in folders.items():
        (root / name).mkdir(parents=True)
        for number in numbers:
            Image.new("RGB", (16, 16), (number, 0, 0)).save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text(f"number {number}")
    return root


def opened(root: Path, *overrides: str) -> Any:
    typed = ["data=imagefolder", f"data.dir={root}", "eval.every=5", "eval.num_buckets=1"]
    config = compose([*typed, *overrides])
    training = open_source(config.data, resolution=16, say=print)
    return open_validation(config, training, say=print)


def test_what_is_not_held_out_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = folder_of_images(tmp_path / "a", {"train": range(8), "validation": range(8, 12)})
    assert len(opened(root)) == 4
    halves = ['data.split="train[:50%]"', 'eval.split="train[50%:]"']
    assert len(opened(root, *halves)) == 4
    with pytest.raises(DataError, match=r"eval.split=test: cannot be opened .*no such folder"):
        opened(root, "eval.split=test")
    with pytest.raises(DataError, match=r"eval.num_buckets=9: the 4 examples"):
        opened(root, "eval.num_buckets=9")
    mixed = folder_of_images(tmp_path / "b", {"photos": range(8), "validation": range(8, 12)})
    with pytest.raises(DataError, match=r"4 of its 4 examples are trained on too"):
        opened(mixed)  # data.split=train is all of the folder where there is no train/
    doubled = folder_of_images(tmp_path / "c", {"train": range(8), "validation": range(7, 12)})
    capsys.readouterr()
    assert len(opened(doubled)) == 5
    assert "1 of 5 images are trained on too" in capsys.readouterr().out
    assert opened(root, "eval.every=null", "eval.num_buckets=10") is None


def test_a_split_that_does_not_exist_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = start(tmp_path, "eval.every=3", "eval.split=nonsense")
    assert code == 2 and not path.exists()
    assert "eval.split=nonsense: cannot be opened" in capsys.readouterr().err
