"""Killed, stopped, damaged, changed: a run goes on as if nothing had happened, or says why not."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.experiment.conftest import Command

STEPS = 30
FEW_FILES = ["export.at_end=false", "metrics.sinks=[jsonl]"]
RUN = [
    *FEW_FILES,
    f"train.max_steps={STEPS}",
    "checkpoint.every=7",
    "checkpoint.keep=3",
    "run.name=run",
]
SHORT = [
    *FEW_FILES,
    "sample.every=null",
    "train.max_steps=4",
    "checkpoint.every=2",
    "run.name=run",
]
# Compiled for longer than the model of the other tests.
LARGER = [
    "model.unet.block_out_channels=[16,32]",
    "model.unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D]",
    "model.unet.attention_head_dim=[1,2]",
    "model.unet.layers_per_block=2",
]
Rows = Callable[[Path], list[dict[str, Any]]]


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by path."""
    return arrays_of(run / "checkpoints" / str(step))


def arrays_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """As `arrays`."""
    folder = checkpoint / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = checkpointer.restore(folder, restore_args=as_numpy)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Returns once metrics.jsonl has a row of `step` or later."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)
    if process.poll() is None:
        process.kill()
        pytest.fail(f"step {step} was not reached")


def assert_same_run(left: Path, right: Path, rows: Rows) -> None:
    assert rows(left) == rows(right)
    there, here = arrays(left, STEPS), arrays(right, STEPS)
    assert there.keys() == here.keys()
    different = [name for name in there if there[name].tobytes() != here[name].tobytes()]
    assert not different
    assert any("ema" in name for name in there) and any("mu" in name for name in there)
    picture = f"samples/{STEPS:07d}.png"
    assert (left / picture).read_bytes() == (right / picture).read_bytes()


def trained(folder: Path, overrides: Sequence[str]) -> Path:
    """The folder of a run that has come to its end in `folder`."""
    command = Command(folder)
    code, output = command.run(*overrides)
    assert code == 0, output
    return command.path("run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    return trained(tmp_path_factory.mktemp("whole"), RUN)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run, of which every test has a copy."""
    return trained(tmp_path_factory.mktemp("finished"), SHORT)


@pytest.fixture
def short(finished: Path, command: Command) -> Path:
    """A copy of the short run, where the command of this test finds it."""
    shutil.copytree(finished, command.path("run"))
    return command.path("run")


def test_kills_at_random_times_change_nothing(whole: Path, command: Command, rows: Rows) -> None:
    draw = random.Random(11)
    run = command.path("run")
    kills = 0
    while True:
        process = command.start(*RUN, slow_after=STEPS - 2 if kills < 4 else None)
        if kills < 4:
            before = rows(run)[-1]["step"] if (run / "metrics.jsonl").exists() else 0
            wait_for_step(process, run, min(before + draw.randrange(3, 9), STEPS - 1))
            time.sleep(draw.random() * 0.2)
            process.kill()
            kills += 1
        output, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert_same_run(whole, run, rows)
    attempts = sorted((run / "attempts").glob("*.json"), key=lambda path: int(path.stem))
    assert len(attempts) == kills + 1
    outcomes = [json.loads(path.read_text())["outcome"] for path in attempts]
    assert outcomes == ["interrupted"] * kills + ["finished"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_goes_on(
    whole: Path, command: Command, rows: Rows, number: signal.Signals
) -> None:
    process = command.start(*RUN, slow_after=10)
    wait_for_step(process, command.path("run"), 9)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert "the same command goes on" in output
    stopped = status(command.path("run"))
    assert stopped["status"] == "interrupted" and stopped["step"] < STEPS
    assert (command.path("run") / "checkpoints" / str(stopped["step"]) / "manifest.json").is_file()
    code, output = command.run(*RUN)
    assert code == 0, output
    assert f"continuing from step {stopped['step']}" in output
    assert_same_run(whole, command.path("run"), rows)


def test_signal_during_compilation_ends_at_once(command: Command) -> None:
    process = command.start(*RUN, *LARGER, "run.compilation_cache_dir=null")
    assert process.stdout is not None
    assert "steps of 4" in process.stdout.readline()
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75 and "compiled in" not in output, output
    assert status(command.path("run"))["status"] == "interrupted"


def test_damaged_checkpoint_falls_back_and_ends_the_same(
    whole: Path, command: Command, rows: Rows
) -> None:
    run = command.path("run")
    process = command.start(*RUN, slow_after=23)
    wait_for_step(process, run, 23)
    process.kill()
    process.communicate(timeout=600)
    saved = sorted(int(p.parent.name) for p in run.glob("checkpoints/[0-9]*/manifest.json"))
    newest, before = saved[-1], saved[-2]
    data = max(
        (run / "checkpoints" / str(newest) / "state").rglob("*"), key=lambda p: p.stat().st_size
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 4
    data.write_bytes(content)
    code, output = command.run(*RUN)
    assert code == 0, output
    assert f"checkpoint {newest} is damaged" in output
    assert f"continuing from {before}" in output
    assert (run / "checkpoints" / f"{newest}.damaged").is_dir()
    assert_same_run(whole, run, rows)


def test_nothing_valid_left_refuses_to_start_anew(command: Command, short: Path) -> None:
    for manifest in short.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    code, output = command.run(*SHORT, "train.max_steps=6")
    assert code == 1
    assert "no valid checkpoint left" in output
    assert "Traceback" not in output
    assert status(short)["status"] == "failed"


def test_starting_again(command: Command, short: Path, rows: Rows) -> None:
    """Finished says so; more steps go on; changed keys are refused, told or free; policies hold."""
    run = short

    code, output = command.run_here(*SHORT)
    assert (code, "is finished" in output) == (0, True)
    code, output = command.run(*SHORT, "train.max_steps=6")
    assert code == 0 and "continuing from step 4" in output
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]

    code, output = command.run_here(*SHORT, "train.max_steps=8", "run.seed=5")
    assert code == 2 and "run.seed" in output and "0 there, 5 here" in output
    assert status(run)["status"] == "finished"
    code, output = command.run(*SHORT, "train.max_steps=8", "optimizer.lr=2e-5", "metrics.every=2")
    assert code == 0 and "changed since the last start: optimizer.lr" in output

    code, output = command.run_here(*SHORT, "run.resume=never")
    assert code == 2 and "run.resume=never" in output
    code, output = command.run_here("train.max_steps=4", "run.name=other", "run.resume=must")
    assert code == 2 and "run.resume=must" in output
    assert not command.path("other").exists()

    code, output = command.run(*FEW_FILES, "train.max_steps=8", f"run.resume_from={run}@6")
    assert code == 0, output
    (fork,) = (path for path in command.path().iterdir() if path.name != "run")
    assert json.loads((fork / "run.json").read_text())["parent"] == f"{run}@6"
    assert [row["step"] for row in rows(fork)] == [7, 8]
    assert (fork / "checkpoints" / "6" / "manifest.json").is_file()
    code, output = command.run_here("train.max_steps=8", f"run.resume_from={run}@7")
    assert code == 2 and "run.resume_from" in output and "it has the steps" in output
    changes = ("train.ema=false", "train.text_encoder=true", "model.weights_dtype=bfloat16")
    for change in (*changes, "optimizer.kind=lion"):
        code, output = command.run_here("train.max_steps=8", f"run.resume_from={run}", change)
        assert code == 2 and "its state has other parts: " + change.split("=")[0] in output, output
    assert len(list(command.path().iterdir())) == 2


def test_second_process_is_refused_while_the_first_lives(command: Command) -> None:
    first = command.start(*RUN, slow_after=2, step_s=20)
    wait_for_step(first, command.path("run"), 1)
    code, output = command.run_here(*RUN)
    first.kill()
    first.communicate(timeout=600)
    assert code == 2, output
    assert f"in use by process {first.pid}" in output
    assert status(command.path("run"))["status"] == "running"


def test_updates_that_are_not_finite_stop_the_run(command: Command, short: Path) -> None:
    broken = ["optimizer.lr=1e38", "optimizer.max_grad_norm=null", "train.max_bad_steps=3"]
    code, output = command.run(*SHORT, *broken, "train.max_steps=40", "checkpoint.every=0")
    assert code == 1, output
    assert "train.max_bad_steps=3" in output and "Traceback" not in output
    assert status(short)["status"] == "failed"
    assert (short / "checkpoints" / "4" / "manifest.json").is_file()
