"""A run that is asked to stop through its folder: it saves, says what was asked, and goes on."""

import json
import subprocess
import time
from pathlib import Path

from sdx.record.paths import RunPaths
from sdx.record.status import Status
from sdx.record.stop_request import request_stop
from tests.experiment.conftest import Command
from tests.parallel.test_rehearsal import begin

RUN = ["run.name=run", "sample.every=null"]
ENDLESS = "train.max_steps=100000"


def wait_for_rows(process: subprocess.Popen[str], run: Path) -> None:
    """Returns once the run has trained some steps."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 600
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)


def end_of(process: subprocess.Popen[str]) -> str:
    """What it said; its exit code is that of an interrupted run."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    return output


def test_a_pruned_run_is_saved_and_goes_on_when_it_is_typed_again(command: Command) -> None:
    run = command.path("run")
    process = command.start(*RUN, ENDLESS)
    wait_for_rows(process, run)
    request_stop(RunPaths(run), Status.pruned, "worse than the others")
    output = end_of(process)
    status = json.loads((run / "status.json").read_text())
    step = status["step"]
    assert (status["status"], status["reason"]) == ("pruned", "worse than the others")
    assert f"pruned (worse than the others) after step {step}, saved" in output
    assert (run / "checkpoints" / str(step)).is_dir()
    attempt = json.loads((run / "attempts" / "1.json").read_text())
    assert (attempt["outcome"], attempt["last_step"]) == ("pruned", step)
    code, output = command.run(*RUN, f"train.max_steps={step + 2}")
    assert code == 0 and f"continuing from step {step}" in output, output
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", step + 2)


def test_all_hosts_of_a_cancelled_run_stop_after_the_same_step(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    process = begin(tmp_path, ENDLESS, "sample.every=null")
    wait_for_rows(process, run)
    request_stop(RunPaths(run), Status.cancelled)
    output = end_of(process)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "cancelled" and output.count("cancelled after step") == 1, output
    assert (run / "checkpoints" / str(status["step"])).is_dir()
