"""`python -m sdx.runs`: what it writes, shows, follows and ends, and with what exit code."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdx import runs
from sdx.record.files import read_json, write_json
from sdx.record.lock import RunLock
from sdx.record.owner import owner_of
from sdx.record.status import Status, write_status
from sdx.record.stop_request import read_stop
from sdx_launchers import places
from sdx_launchers.jobs import Ended, Job
from sdx_launchers.launch_record import write_outcome
from sdx_launchers.runs import control, tidy
from sdx_launchers.runs.comparison import compare, render
from sdx_launchers.runs.control import Watch
from sdx_launchers.sweep.process import SweepProcess
from tests.launchers.made_runs import launched, make_job, make_run, make_sweep

pytestmark = pytest.mark.fast
TRACE = """\
2026-11-22T12:00:00Z step 3
2026-11-22T12:00:01Z Traceback (most recent call last):
      File "step.py", line 1, in step
    RuntimeError: no more
"""


def make_lrs(outputs: Path, **kinds: Mapping[str, Any]) -> Path:
    """A sweep of runs with these learning rates, each as `make_run` is told."""
    names = {f"lr{lr}": [f"optimizer.lr={lr}"] for lr in kinds}
    for (name, overrides), fields in zip(names.items(), kinds.values(), strict=True):
        if fields:
            lr = float(overrides[0].partition("=")[2])
            make_run(outputs, name, config={"optimizer.lr": lr}, overrides=overrides, **fields)
    return make_sweep(outputs, names)


def test_the_summary_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_lrs(
        tmp_path,
        **{
            "1": {"validation": {4: 0.3}},
            "2": {"status": Status.failed, "reason": "RuntimeError: no"},
        },
        **{"3": {"validation": {2: 0.2, 4: None}}, "4": {}},
    )
    (tmp_path / "lr2" / "log.txt").write_text(TRACE)
    assert runs.main([str(folder)]) == 0
    assert "lr2: RuntimeError: no" in capsys.readouterr().out
    summary = read_json(folder / "summary.json")
    assert summary is not None and summary["best"] == "lr3" and summary["keys"] == ["optimizer.lr"]
    assert [run["status"] for run in summary["runs"]] == ["finished", "failed", "finished", "new"]
    rows = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))
    assert [(row["name"], row["optimizer.lr"], row["best"], row["best_step"]) for row in rows] == [
        ("lr1", "1", "0.3", "4"),
        ("lr2", "2", "", ""),
        ("lr3", "3", "0.2", "2"),
        ("lr4", "4", "", ""),
    ]
    assert rows[2]["last"] == "" and rows[1]["reason"] == "RuntimeError: no"
    page = (folder / "summary.md").read_text()
    assert "| **lr3** | 3 | finished | 4/4 | nan | 0.2 @2 | 1m30s | 1 |" in page
    assert "## lr2: failed" in page and "        RuntimeError: no more\n" in page
    assert "step 3" not in page, "the traceback alone"
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_a_summary_without_any_run(tmp_path: Path) -> None:
    folder = make_lrs(tmp_path, **{"1": {}, "2": {}})
    assert runs.main([str(folder)]) == 0
    assert not (folder / "curves.png").exists()
    assert "curves.png" not in (folder / "summary.md").read_text()


@pytest.mark.parametrize("act", [["--cancel"], ["--sweep-up"], ["--tidy"], ["--compare", "a", "b"]])
def test_what_cannot_be_followed_is_refused(
    act: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        runs.main([*act, "--follow"])
    assert "--follow: stands alone or with --logs" in capsys.readouterr().err


@pytest.mark.parametrize("act", [["--sweep-up"], ["--compare", "a", "b"]])
def test_a_folder_that_nothing_would_look_at_is_refused(
    act: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        runs.main(["outputs", *act])
    assert "argument FOLDER: " in capsys.readouterr().err


def test_an_outputs_folder_goes_on_between_two_jobs_of_a_sweep(tmp_path: Path) -> None:
    """Its next job is not on record yet."""
    folder = make_lrs(tmp_path, **{"1": {"losses": [0.5]}, "2": {}})
    watch = Watch(tmp_path)
    watch.look()
    assert not watch.goes_on
    with SweepProcess(folder):
        assert watch.goes_on
    assert not watch.goes_on


def test_curves_show_a_run_with_a_single_value(tmp_path: Path) -> None:
    from sdx_launchers.runs.curves import draw_curves

    png = draw_curves(Watch(make_lrs(tmp_path, **{"1": {"losses": [0.5]}})).look())
    assert png is not None
    with Image.open(io.BytesIO(png)) as picture:
        left_of_legend = picture.convert("RGB").crop((0, 0, picture.width // 2, picture.height))
    colours = [colour for _, colour in left_of_legend.getcolors(1 << 20) or ()]
    assert (31, 119, 180) in colours, "tab10's first"


def test_curves_tell_thirty_runs_apart(tmp_path: Path) -> None:
    from sdx_launchers.runs.curves import _named, _style

    kinds = {str(n): {"losses": [1.0, n / 40]} for n in range(1, 31)}
    watch = Watch(make_lrs(tmp_path, **kinds))
    named = _named(watch.look())
    assert len(named) == 24 and "lr30" not in named and "lr24" in named
    styles = [json.dumps(_style(number, is_best=False)) for number in range(30)]
    assert len(set(styles)) == 30


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    patch = "diff --git a/sdx/x.py b/sdx/x.py\n--- a/sdx/x.py\n+++ b/sdx/x.py\n-a\n+b\n+c\n"
    first = make_run(
        tmp_path, "a", git_commit="1234", packages={"jax": "0.10", "numpy": "2"},
        git_patch="attempts/1.patch", python="3.11.7", losses=[0.5, 0.25],
        config={"run.name": "a", "data.name": "shapes"},
    )  # fmt: skip
    second = make_run(
        tmp_path, "b", git_commit="5678", packages={"jax": "0.11", "numpy": "2"}, python="3.11.7",
        config={"optimizer.lr": 0.5, "run.name": "b", "data.name": "shapes"},
        validation={2: 0.3}, validation_record={"of": "x"},
    )  # fmt: skip
    first.patch(1).write_text(patch)
    second.evaluation.write_text('{"fid": 12.5, "step": 4}\n')
    lines = render(compare(first.root, second.root)).splitlines()
    found = {line.split()[0] if "  " in line else line: line.split()[1:] for line in lines if line}
    assert found["optimizer.lr"] == ["0.001", "0.5"]
    assert found["git_commit"] == ["1234", "5678"] and found["jax"] == ["0.10", "0.11"]
    assert "  uncommitted sdx/x.py  +2 -1 lines  -" in lines
    assert found["loss"] == ["0.25", "0.2"] and "  sdx.evaluate fid" in "\n".join(lines)
    for same in ("run.name", "data.name", "numpy", "python"):
        assert same not in found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "holds no run and no sweep"),
        (["--compare", "outputs/a", "nowhere"], "nowhere: holds no run"),
        (["--compare", "outputs/a", "outputs/half"], "run.json: not readable"),
        (["outputs/sweeps/damaged"], "sweep.json"),
        (["outputs", "--cancel"], "0 sweeps go on there"),
        (["outputs/sweeps/damaged", "--tidy"], "has no folder snapshots; --tidy takes an outputs"),
        (["gs://bucket/runs", "--tidy"], "--tidy takes an outputs folder"),
        (["ftp://host/runs"], "must be a local folder or begin with"),
        (["--objective", "loss:best"], "METRIC:min"),
        (["--logs", "--cancel"], "not allowed with"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs", "a")
    make_run(tmp_path / "outputs", "half").run.write_text('{"config": {')
    damaged = make_sweep(tmp_path / "outputs", {"a": []}, sweep="damaged")
    (damaged / "sweep.json").write_text('{"jobs": [{}]}')
    try:
        code = runs.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err


def test_logs_of_each_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_lrs(tmp_path, **{"1": {"losses": [0.1]}, "2": {}})
    (tmp_path / "lr1" / "log.txt").write_text("".join(f"line {n}\n" for n in range(100)))
    slurm = tmp_path / "7_0_log.out"
    slurm.write_text("said by rank 0\x1b[31m\nhf_" + "a" * 30 + "\n")
    launched(make_job(tmp_path, "lr2"), "other", logs=[str(slurm), str(tmp_path / "gone")])
    assert runs.main([str(folder), "--logs"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"==> lr1 (finished): {tmp_path}/lr1/log.txt <==" and said[1] == "line 80"
    assert said[21:] == [
        f"==> lr2 (queued): {slurm} <==", "said by rank 0[31m", "REDACTED"
    ]  # fmt: skip


def test_followed_logs_go_on_in_the_log_of_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SLURM has it: each start of a job has another file."""
    folder = make_lrs(tmp_path, **{"1": {}})
    job, said = make_job(tmp_path, "lr1"), list[str]()
    logs = [tmp_path / "first.out", tmp_path / "second.out"]
    logs[0].write_text("one\ntw")
    launched(job, "other", logs=[str(logs[0])])

    def second() -> None:
        launched(job, "other", logs=[str(logs[1])])
        logs[1].write_text("three\n")

    events: Iterator[Callable[[], object]] = iter(
        [
            lambda: logs[0].write_text("one\ntwo\n"),
            second,
            lambda: logs[1].write_text("anew\n"),
            lambda: make_run(tmp_path, "lr1"),
        ]
    )
    monkeypatch.setattr(control.time, "sleep", lambda s: next(events)())
    control.show_logs(Watch(folder), said.append, follows=True)
    heads = [f"==> lr1: {log} <==" for log in logs]
    assert said == [heads[0], "one", "two", heads[1], "three", "anew"]


def test_following_ends_when_all_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_lrs(tmp_path, **{"1": {"status": Status.running}, "2": {}, "3": {}})
    running = make_job(tmp_path, "lr1").paths
    launched(make_job(tmp_path, "lr2"), "other")
    with SweepProcess(folder) as process, RunLock(running.lock):

        def third() -> None:
            make_run(tmp_path, "lr3", status=Status.failed, reason="RuntimeError: no")
            process.__exit__(None, None, None)

        events: Iterator[Callable[[], object]] = iter(
            [
                lambda: write_status(running, Status.finished, step=4),
                lambda: make_run(tmp_path, "lr2"),
                lambda: None,  # the sweep's process is about to start the third
                third,
            ]
        )
        monkeypatch.setattr(control.time, "sleep", lambda s: next(events)())
        assert runs.main([str(folder), "--follow"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "lr1: running, step 4, loss 0.2",
        "lr2: queued, step 0",
        "lr3: new, step 0",
        "lr1: finished, step 4, loss 0.2",
        "lr2: finished, step 4, loss 0.2",
        "lr3: failed, step 4, loss 0.2",
    ]
    assert next(events, None) is None and (folder / "summary.json").is_file()


@contextmanager
def child(script: str = "import time; time.sleep(600)") -> Iterator[subprocess.Popen[str]]:
    """A process that stands for a job's."""
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_cancelling_asks_jobs_of_the_sweep_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running: Mapping[str, Any] = {"status": Status.running}
    folder = make_lrs(
        tmp_path, **{"1": running, "2": running, "3": running, "4": {"losses": [1.0]}}
    )
    jobs = {n: make_job(tmp_path, f"lr{n}", "other" if n == 2 else "lrs") for n in (1, 2, 3)}
    with child() as process, SweepProcess(folder) as sweep:
        own = owner_of(process.pid)
        for n, job in jobs.items():
            write_json(job.paths.lock, asdict(own))
            if n != 3:
                launched(job, "sdx_local", process=asdict(own))
        assert runs.main([str(folder), "--cancel"]) == 0
        assert sweep.is_cancelled
        assert process.poll() is None, "a run is asked first"
        said = capsys.readouterr().out.splitlines()
        assert said == [
            "lrs: its process starts no more jobs",
            "lr1: asked to save and end",
            "lr2: left alone, it is a job of the sweep other",
            "lr3: left alone, no sweep started it",
            "lr4: finished, nothing to cancel",
        ]
        asked = read_stop(jobs[1].paths)
        assert asked is not None and asked.status is Status.cancelled
        assert read_stop(jobs[2].paths) is None and read_stop(jobs[3].paths) is None
        assert runs.main([str(folder), "--cancel"]) == 0
        assert process.wait(timeout=300) == -signal.SIGKILL
    assert "lr1: ended" in capsys.readouterr().out


def test_a_job_that_compiles_nothing_yet_is_told_by_a_signal(tmp_path: Path) -> None:
    folder = make_lrs(tmp_path, **{"1": {}})
    with child() as process:
        launched(make_job(tmp_path, "lr1"), "sdx_local", process=asdict(owner_of(process.pid)))
        assert runs.main([str(folder), "--cancel"]) == 0
        assert process.wait(timeout=300) == -signal.SIGTERM


def test_an_outputs_folder_cancels_its_only_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sweep in ("one", "two"):
        make_sweep(tmp_path, {sweep: []}, sweep=sweep)
        launched(make_job(tmp_path, sweep, sweep), "other")
    assert runs.main([str(tmp_path), "--cancel"]) == 2
    said = capsys.readouterr().err
    assert "2 sweeps go on" in said and "sweeps/one" in said and "sweeps/two" in said
    make_run(tmp_path, "one")
    assert runs.main([str(tmp_path), "--cancel"]) == 0
    assert capsys.readouterr().out.startswith("two: waits in the process of its sweep")


class Scheduler:
    """A launcher whose jobs go on without their sweep."""

    outlives_driver = True
    states: dict[str, Ended | None] = {}
    stopped: list[str] = []

    def __init__(self, settings: object):
        pass

    def attach(self, job: Job, launch: Mapping[str, Any]) -> Any:
        return _Known(job, str(launch["id"])) if launch["id"] in self.states else None


class _Known:
    def __init__(self, job: Job, id: str):
        self.job, self.id = job, id

    def poll(self) -> Ended | None:
        return Scheduler.states[self.id]

    def stop(self) -> None:
        Scheduler.stopped.append(self.id)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> type[Scheduler]:
    monkeypatch.setattr(Scheduler, "states", {})
    monkeypatch.setattr(Scheduler, "stopped", [])
    for module in (control, tidy):
        monkeypatch.setattr(module, "make_launcher", lambda name, settings: Scheduler(settings))
    return Scheduler


def test_a_job_that_its_scheduler_requeued_is_queued(
    tmp_path: Path, scheduler: type[Scheduler]
) -> None:
    interrupted = {"status": Status.interrupted}
    folder = make_lrs(tmp_path, **{"1": interrupted, "2": interrupted, "3": {}})
    scheduler.states["1"] = None
    for n in (1, 2, 3):
        launched(make_job(tmp_path, f"lr{n}"), id=str(n), released=n != 3)
    table = Watch(folder).look()
    assert [run.status for run in table.runs] == ["queued", "interrupted", "queued"]
    assert runs.main([str(folder), "--cancel"]) == 0
    assert scheduler.stopped == ["1"], "the third is just being handed in"


def test_an_end_that_nobody_saw_is_noted(
    tmp_path: Path, scheduler: type[Scheduler], capsys: pytest.CaptureFixture[str]
) -> None:
    from sdx.config.compose import to_yaml
    from tests.config.quick import quick

    folder = make_lrs(tmp_path, **{"1": {}, "2": {}})
    for n, ended in ((1, Ended(Status.finished)), (2, Ended(Status.cancelled, "by hand"))):
        job = make_job(tmp_path, f"lr{n}")
        launched(job, id=str(n))
        (job.folder / "config.yaml").write_text(to_yaml(quick([])))
        scheduler.states[str(n)] = ended
    Watch(folder).look()
    first, second = Watch(folder).look().runs
    assert (first.status, second.status) == ("failed", "cancelled"), "one has no record of its run"
    assert second.reason == "by hand" and "record" in str(first.reason)


def test_an_end_is_not_noted_of_a_job_that_was_handed_over_again(
    tmp_path: Path, scheduler: type[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdx.config.compose import to_yaml
    from tests.config.quick import quick

    folder = make_lrs(tmp_path, **{"1": {}})
    job = make_job(tmp_path, "lr1")
    launched(job, id="1", released=True)
    (job.folder / "config.yaml").write_text(to_yaml(quick([])))
    scheduler.states["1"] = Ended(Status.cancelled)

    def poll(self: _Known) -> Ended | None:
        launched(job, id="2", released=True)
        return Scheduler.states[self.id]

    monkeypatch.setattr(_Known, "poll", poll)
    assert [run.status for run in Watch(folder).look().runs] == ["queued"]
    assert not (job.folder / "outcome.json").exists()


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder of one copy of code, and of something else."""
    folder = tmp_path / "snapshots"
    for name in ("0123456789abcdef", "mine"):
        (folder / name / "sdx").mkdir(parents=True)
        (folder / name / "sdx" / "train.py").touch(mode=0o400)
        (folder / name / "snapshot.json").touch(mode=0o400)
    return folder


def test_copies_of_code_that_no_job_needs_are_deleted(
    tmp_path: Path,
    copies: Path,
    scheduler: type[Scheduler],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of jobs that have ended; those that failed or were cut off start with a new copy."""
    with child() as process:
        owner = owner_of(process.pid)
    launched(make_job(tmp_path, "died"), "sdx_local", process=asdict(owner))
    elsewhere = asdict(replace(owner, host="elsewhere"))
    launched(make_job(tmp_path, "ended-elsewhere"), "sdx_local", process=elsewhere)
    make_run(tmp_path, "failed", status=Status.failed)
    launched(make_job(tmp_path, "failed"), id="1", released=True)
    scheduler.states["1"] = Ended(Status.failed)
    launched(make_job(tmp_path, "forgotten"), id="2", released=True)
    launched(ended := make_job(tmp_path, "ended"), id="3", released=True)
    write_outcome(ended, Ended(Status.interrupted))
    scheduler.states["3"] = None
    assert runs.main([str(tmp_path), "--tidy"]) == 0
    assert capsys.readouterr().out == f"{copies}: 1 copy of code deleted\n"
    assert os.listdir(copies) == ["mine"]
    assert runs.main([str(tmp_path), "--tidy"]) == 0
    assert "0 copies of code deleted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "by", ["a sweep", "a process", "a lock", "a queue", "half a submission", "a damaged record"]
)
def test_copies_of_code_stay_while_something_may_need_them(
    tmp_path: Path,
    copies: Path,
    by: str,
    scheduler: type[Scheduler],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job(tmp_path, "needs-it")
    held: AbstractContextManager[object] = nullcontext()
    own = owner_of(os.getpid())
    match by:
        case "a sweep":
            held = SweepProcess(tmp_path / "sweeps" / "needs-it")
        case "a process":
            launched(job, "sdx_local", process=asdict(own))
        case "a lock":
            launched(job, "sdx_local", process=asdict(replace(own, host="elsewhere")))
            job.paths.root.mkdir()
            held = RunLock(job.paths.lock)
        case "a queue":
            launched(job, id="1", released=True)
            scheduler.states["1"] = None
        case "half a submission":
            launched(job, id="", released=False)
        case _:
            launched(job)
            (job.folder / "launch.json").write_text("{")
    with held:
        assert runs.main([str(tmp_path), "--tidy"]) == 2
    assert "nothing is deleted, it may be the code of what goes on (needs-it)" in (
        capsys.readouterr().err
    )
    assert len(os.listdir(copies)) == 2


def test_strays_are_swept_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdx_launchers.tpu import strays as tpu_strays
    from sdx_launchers.tpu.strays import SweptUp

    for found, code in ((SweptUp(deleted=["sdx-1"]), 0), (SweptUp(faults=["sdx-2: denied"]), 1)):
        monkeypatch.setattr(tpu_strays, "sweep_up", lambda settings, found=found: found)
        assert runs.main(["--sweep-up"]) == code
        assert str(found) in capsys.readouterr().out


def test_a_launcher_that_cannot_be_asked_is_a_fault_of_that_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_lrs(tmp_path, **{"1": {"status": Status.interrupted}})
    launched(make_job(tmp_path, "lr1"), "sdx_slurm")  # half of what that writes
    assert runs.main([str(folder)]) == 0
    assert "lr1: launch.json: its launcher cannot be asked" in capsys.readouterr().out


def test_ctrl_c_ends_the_showing_and_nothing_else(tmp_path: Path) -> None:
    folder = make_lrs(tmp_path, **{"1": {}})
    launched(make_job(tmp_path, "lr1"), "other")
    command = [sys.executable, "-m", "sdx.runs", str(folder), "--follow"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "lr1: queued, step 0\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "goes on" in said and "Traceback" not in said


def test_runs_may_be_written_while_they_are_shown(tmp_path: Path) -> None:
    folder = make_lrs(tmp_path, **{"1": {"status": Status.running}})
    paths: Any = make_job(tmp_path, "lr1").paths
    is_over = threading.Event()

    def write() -> None:
        step = 5
        while not is_over.is_set():
            with open(paths.metrics, "a") as file:
                file.write(json.dumps({"step": step, "loss": 0.1, "validation_loss": 0.5}) + "\n")
            write_status(paths, Status.running, step=step)
            step += 1

    with RunLock(paths.lock):
        writer = threading.Thread(target=write)
        writer.start()
        try:
            seen = []
            while len(set(seen)) < 5:
                [run] = Watch(folder).look().runs
                assert run.status == "running" and not run.faults
                seen.append(run.step)
                time.sleep(0.01)
        finally:
            is_over.set()
            writer.join()
    assert seen == sorted(seen)


def test_places_are_those_of_the_settings() -> None:
    from sdx.config.launching import LAUNCHERS

    assert LAUNCHERS.keys() == places._PLACES.keys()
