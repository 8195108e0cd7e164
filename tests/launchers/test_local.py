"""Jobs as processes of this machine: their share of it, and their end with the sweep's."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdx.config.compose import compose
from sdx.config.launching import LocalSettings
from sdx.record.paths import RunPaths
from sdx_launchers.jobs import Job, LaunchError
from sdx_launchers.local.launcher import LocalLauncher, _check
from sdx_launchers.local.shares import Share
from tests.conftest import require
from tests.experiment.conftest import MICRO
from tests.parallel.test_rehearsal import TARGET, children_of, is_alive
from tests.processes import REPOSITORY

PATIENCE_S = 600.0  # for a slow machine
ENDLESS = ["train.max_steps=100000", "sample.every=null"]


@contextmanager
def sweep(folder: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m sdx.train --multirun` with the micro model; it and all it started are gone
    afterwards."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sdx.train", "--multirun", *MICRO, *overrides],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid)] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    try:
        children = children_of(pid)
    except FileNotFoundError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def wait_until(holds: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Returns once it `holds`; AssertionError with the output where `process` ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if process is not None and process.poll() is not None:
            assert process.stdout is not None
            raise AssertionError(process.stdout.read())
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("outputs/*/status.json"))


def num_rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def saved_steps(run: Path) -> list[int]:
    return sorted(int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit())


def assert_saved(run: Path, status: str) -> None:
    """The run stopped as `status` at a step that it saved."""
    ended = read(run / "status.json")
    assert ended["status"] == status and ended["step"] in saved_steps(run), ended


def test_two_jobs_have_their_own_cores_and_save_when_their_sweep_is_killed(tmp_path: Path) -> None:
    require(len(os.sched_getaffinity(0)) > 1, "a second core")
    with sweep(tmp_path, "run.seed=0,1", "hydra.sweeper.max_parallel=2", *ENDLESS) as process:
        wait_until(lambda: sum(num_rows(run) > 1 for run in runs(tmp_path)) == 2, process)
        jobs = [int(read(path)["id"]) for path in tmp_path.glob("outputs/launches/*/launch.json")]
        cores = [os.sched_getaffinity(job) for job in jobs]
        assert len(jobs) == 2 and cores[0] and cores[1] and not cores[0] & cores[1]
        assert set(jobs) <= set(children_of(process.pid))
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(job) for job in jobs))
    for run in runs(tmp_path):
        assert_saved(run, "interrupted")
        record = read(run / "run.json")
        assert record["launcher"] == "sdx_local" and record["sweep"] in os.listdir(
            tmp_path / "outputs" / "sweeps"
        )
        assert any(text.startswith("run.seed=") for text in record["overrides"])
        assert "step" in (tmp_path / "outputs/launches" / run.name / "log.txt").read_text()


def test_the_hosts_of_a_rehearsal_end_with_the_sweep_as_well(tmp_path: Path) -> None:
    with sweep(tmp_path, *TARGET, *ENDLESS) as process:
        wait_until(lambda: len(descendants(process.pid)) >= 3, process)  # the job, and its hosts
        family = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in family))


def test_ctrl_c_has_the_job_save_and_the_same_command_goes_on(tmp_path: Path) -> None:
    typed = ["run.seed=0", "hydra.sweeper.name=mine"]
    with sweep(tmp_path, *typed, *ENDLESS) as process:
        wait_until(lambda: any(num_rows(run) > 1 for run in runs(tmp_path)), process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
    [run] = runs(tmp_path)
    assert process.returncode == 75, output
    assert_saved(run, "interrupted")
    assert "tiny on shapes" in output and "interrupted by SIGTERM" in output  # what the job said
    step = read(run / "status.json")["step"]
    with sweep(tmp_path, *typed, f"train.max_steps={step + 2}", ENDLESS[1]) as process:
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert f"continuing from step {step}" in output and output.count("tiny on shapes") == 1
    assert read(run / "status.json")["step"] == step + 2


def test_a_job_that_is_killed_before_its_first_word_is_started_by_the_same_command(
    tmp_path: Path,
) -> None:
    with sweep(tmp_path, "run.seed=0", *ENDLESS) as process:
        launches = tmp_path / "outputs" / "launches"
        wait_until(lambda: list(launches.glob("*/launch.json")), process)
        [launch] = launches.glob("*/launch.json")
        os.kill(int(read(launch)["id"]), signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75 and "interrupted" in output and "SIGKILL" in output, output
    with sweep(tmp_path, "run.seed=0", *ENDLESS, "hydra.sweeper.dry_run=true") as process:
        planned, _ = process.communicate(timeout=PATIENCE_S)
    assert "starts" in planned and "left" not in planned, planned


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_a_job_that_crashes_by_itself_has_failed(end: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "ends"
    script.write_text(f"#!/bin/sh\nkill -{end} $$\n")
    script.chmod(0o700)
    folder = tmp_path / "outputs" / "launches" / "a"
    folder.mkdir(parents=True)
    here = replace(job(), folder=folder)
    with LocalLauncher(LocalSettings(python=str(script))) as launcher:
        [child] = launcher.start([here], None)
        wait_until(lambda: not child.is_running())
        ended = child.poll()
    assert ended is not None and ended.reason == f"ended by {end.name}"
    assert ended.status.name == ("interrupted" if end == signal.SIGKILL else "failed")


def test_a_folder_that_takes_no_sweep_is_refused(tmp_path: Path) -> None:
    with sweep(tmp_path, "run.seed=0,1", "run.output_dir=/dev/null/runs") as process:
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "cannot be written (Not a directory); use another run.output_dir" in output


def job(*overrides: str) -> Job:
    folder = Path("/its/launches/a job")
    return Job("job", "train", compose([*overrides]), (), RunPaths(Path("run")), folder, "sweep")


@pytest.mark.fast
def test_a_dry_run_shows_commands_that_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    require(len(os.sched_getaffinity(0)) > 1, "a second core")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = LocalLauncher(LocalSettings(python="/opt/my python"))
    first, second = launcher.describe([job(), job()], 2).splitlines()
    assert first != second and first.startswith("OMP_NUM_THREADS=") and "taskset -c " in second
    for alone in (
        launcher.describe([job()], None),
        LocalLauncher(LocalSettings(python="/opt/my python", pin=False)).describe([job()], 2),
    ):
        words = shlex.split(alone)
        assert words[0] == "/usr/bin/env" and words[2] == "SDX_JOB=/its/launches/a job/job.json"
        assert words[3:7] == ["/opt/my python", "-P", "-m", "sdx.train"]
        assert words[-3:] == [">>", "/its/launches/a job/log.txt", "2>&1"]


@pytest.mark.fast
def test_a_share_too_small_for_a_job_is_an_error() -> None:
    wants_8: Sequence[str] = ("hardware=gpu_h100_8", "train.global_batch_size=8")
    with pytest.raises(LaunchError, match=r"max_parallel=2: gives a job 4 GPUs.*needs 8"):
        _check(job(*wants_8), Share((0,), ("0", "1", "2", "3")), 2)
    _check(job(*wants_8), Share((0,), ("0", "1", "2", "3")), 1)  # the run itself says it better
    _check(job("hardware=cpu"), Share((0,), ("0",)), 2)
