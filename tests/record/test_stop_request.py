"""Asking a run to stop through its folder, and what its record says of it afterwards."""

import json
import threading
from pathlib import Path

import pytest

from sdx.record.launched import scheduler_ids
from sdx.record.paths import RunPaths
from sdx.record.run import Admission, RunRecord, admit, start
from sdx.record.status import Status, read_status
from sdx.record.stop_request import StopRequest, StopWatch, read_stop, request_stop

pytestmark = pytest.mark.fast


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    (tmp_path / "run").mkdir()
    return RunPaths(tmp_path / "run")


def begin(paths: RunPaths) -> RunRecord:
    return start(paths, config_yaml="", config={}, overrides=["a=1"], resume="auto", max_steps=9)


@pytest.mark.parametrize("status", [Status.pruned, Status.cancelled])
def test_an_interrupted_run_ends_as_was_asked(paths: RunPaths, status: Status) -> None:
    record = begin(paths)
    request_stop(paths, status, "worse than the others")
    record.finish(Status.interrupted, step=3)
    ended, attempt = read_status(paths), json.loads((paths.attempts / "1.json").read_text())
    assert ended is not None
    assert (ended.status, ended.step, ended.reason) == (status, 3, "worse than the others")
    assert (attempt["outcome"], attempt["reason"]) == (status.name, "worse than the others")


def test_a_run_that_was_done_first_is_finished(paths: RunPaths) -> None:
    record = begin(paths)
    request_stop(paths, Status.pruned)
    record.finish(Status.finished, step=9)
    ended = read_status(paths)
    assert ended is not None and ended.status is Status.finished


@pytest.mark.parametrize("status", [Status.pruned, Status.cancelled])
def test_the_same_start_goes_on_and_hears_nothing_of_before(
    paths: RunPaths, status: Status
) -> None:
    record = begin(paths)
    request_stop(paths, status)
    record.finish(Status.interrupted, step=3)
    assert admit(paths, resume="auto", max_steps=9) is Admission.resume
    record = begin(paths)
    assert (record.attempt, record.step, read_stop(paths)) == (2, 3, None)
    record.finish(Status.interrupted, step=4)
    ended = read_status(paths)
    assert ended is not None and ended.status is Status.interrupted


def test_a_request_that_nobody_heard_is_no_run(paths: RunPaths) -> None:
    request_stop(paths, Status.cancelled)
    assert admit(paths, resume="never", max_steps=9) is Admission.fresh


def test_the_watch_acts_once_when_asked_and_never_afterwards(paths: RunPaths) -> None:
    heard = threading.Event()
    with StopWatch(paths, heard.set, every_s=0.01):
        assert not heard.wait(0.1)
        paths.stop.write_text("{half")  # as on a file system that shows files before they are whole
        assert not heard.wait(0.1) and read_stop(paths) is None
        request_stop(paths, Status.pruned, "why")
        assert heard.wait(300) and read_stop(paths) == StopRequest(Status.pruned, "why")
    paths.stop.unlink()
    heard.clear()
    with StopWatch(paths, heard.set, every_s=0.01):
        pass
    request_stop(paths, Status.pruned)
    assert not heard.wait(0.1)


def test_a_job_says_whose_it_is_and_what_its_scheduler_calls_it(
    paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"sweep": "s", "launcher": "sdx_slurm", "overrides": ["a=1"]}))
    for name in scheduler_ids():
        monkeypatch.delenv(name)
    for name, text in {
        "SDX_JOB": str(job), "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SLURM_CONF": "no",
        "SDX_NODES": "node-0,node-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    begin(paths).finish(Status.finished, step=9)
    run, attempt = (json.loads(path.read_text()) for path in (paths.run, paths.attempts / "1.json"))
    assert (run["sweep"], run["launcher"]) == ("s", "sdx_slurm")
    assert attempt["scheduler"] == {
        "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1", "SDX_NODES": "node-0,node-1"
    }  # fmt: skip
    monkeypatch.delenv("SDX_JOB")
    begin(RunPaths(tmp_path / "other")).finish(Status.finished, step=9)
    run = json.loads((tmp_path / "other" / "run.json").read_text())
    assert run["sweep"] is None and run["launcher"] is None
