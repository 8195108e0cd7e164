"""A sweep's decisions with a launcher that runs nothing: what it starts, waits for, stops."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sdx.config.compose import compose
from sdx.config.errors import ConfigError, Problem
from sdx.config.launching import SweeperSettings
from sdx.config.schema import Config
from sdx.config.sweeping import SweepRequest, SweptJob
from sdx.record.files import read_json, write_text
from sdx.record.snapshot import SnapshotError
from sdx.record.status import Status, write_status
from sdx.record.stop_request import read_stop, request_stop
from sdx.record.store import StoreError
from sdx_launchers.jobs import Ended, Job, LaunchError
from sdx_launchers.launch_record import read_outcome, write_job, write_launch, write_outcome
from sdx_launchers.sweep import course, driver
from sdx_launchers.sweep.folder import make_jobs, sweep_folder, sweep_name
from sdx_launchers.sweep.process import ask_to_cancel
from sdx_launchers.sweep.turn import turn

pytestmark = pytest.mark.fast

NAME = "sdx_local"
DONE, CUT, BAD = Ended(Status.finished), Ended(Status.interrupted), Ended(Status.failed, "it broke")


@cache
def config() -> Config:
    return compose(["train.max_steps=4", "export.at_end=false"])


@dataclass
class Run:
    """What a job does: after so many looks it writes its status and ends as `said`."""

    said: Ended = DONE
    writes: Status | None = Status.finished
    looks: int = 1
    step: int = 4
    act: Callable[[], object] = lambda: None


@dataclass
class Running:
    job: Job
    run: Run
    id: str = "17"
    looks: int = 0
    stops: int = 0

    def poll(self) -> Ended | None:
        self.looks += 1
        self.run.act()
        if self.stops:
            write_status(self.job.paths, Status.interrupted, step=1)
            return CUT
        if self.looks < self.run.looks:
            return None
        if self.run.writes is not None:
            self.job.paths.root.mkdir(parents=True, exist_ok=True)
            write_status(self.job.paths, self.run.writes, step=self.run.step)
        return self.run.said

    def stop(self) -> None:
        self.job.paths.root.mkdir(parents=True, exist_ok=True)
        self.stops += 1


@dataclass
class Place:
    """A launcher by the book; `runs` says what the jobs do, one entry a start."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    parallel: int | None = 1
    takes_all: bool = False
    poll_s: float = 0.001
    outlives_driver: bool = False
    detach: bool = False
    faults: list[Problem] = field(default_factory=list)
    refuses: tuple[str, ...] = ()
    there: dict[str, Running] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    most: int = 0
    handles: list[Running] = field(default_factory=list)
    is_entered: bool = False

    def problems(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        return self.faults

    def describe(self, jobs: Sequence[Job], max_parallel: int | None) -> str:
        return f"would start {', '.join(job.name for job in jobs)}"

    def start(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Running]:
        assert self.is_entered
        if any(job.name in self.refuses for job in jobs):
            raise LaunchError("no room here")
        self.started += [job.name for job in jobs]
        new = [Running(job, self.runs.get(job.name, [Run()]).pop(0)) for job in jobs]
        self.handles += new
        for job in jobs:
            write_launch(job, NAME, "17")
        self.most = max(self.most, sum(not read_outcome(one.job.folder) for one in self.handles))
        return new

    def attach(self, job: Job, launch: Mapping[str, Any]) -> Running | None:
        return self.there.get(job.name)

    def __enter__(self) -> "Place":
        self.is_entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_entered = False


@dataclass
class Sweep:
    """The sweep of these jobs in this folder, typed again and again."""

    request: SweepRequest
    jobs: list[Job]

    def run(self, place: Place, **settings: Any) -> int:
        for one in self.jobs:
            place.runs.setdefault(one.name, [Run()])
        return driver.sweep(self.request, SweeperSettings(**settings), NAME, place)

    @property
    def folder(self) -> Path:
        return sweep_folder(self.jobs[0].config, self.jobs[0].sweep)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Three jobs, called a, b and c."""
    monkeypatch.chdir(tmp_path)
    return make_sweep("train")


def make_sweep(command: str) -> Sweep:
    swept = [
        SweptJob(replace(config(), run=replace(config().run, name=name)), [f"run.seed={number}"])
        for number, name in enumerate("abc")
    ]
    request = SweepRequest(command, ["run.seed=0,1,2"], swept, lambda batches: swept)
    return Sweep(request, make_jobs(command, swept, sweep_name(command, swept, None)))


def made(job: Job, status: Status, step: int = 2, reason: str | None = None) -> None:
    job.paths.root.mkdir(parents=True, exist_ok=True)
    write_status(job.paths, status, step=step, reason=reason)


def handed_over(job: Job, place: Place, run: Run) -> Running:
    """As a sweep before this one left it."""
    job.folder.mkdir(parents=True)
    write_launch(job, NAME, "17")
    place.there[job.name] = Running(job, run)
    return place.there[job.name]


def test_all_jobs_run_one_at_a_time_and_a_second_time_none(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place()
    assert sweep.run(place) == 0
    assert place.started == ["a", "b", "c"] and place.most == 1
    again = Place()
    capsys.readouterr()
    assert sweep.run(again) == 0
    said = capsys.readouterr().out
    assert again.started == [] and said.count("skipped") == 3


def test_what_is_done_what_goes_on_and_what_is_left_alone(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = sweep.jobs
    made(a, Status.finished, 4)
    made(b, Status.running)  # with nobody who runs it: it was killed
    made(c, Status.failed, reason="no luck")
    place = Place()
    assert sweep.run(place) == 1
    said = capsys.readouterr().out
    assert place.started == ["b"]
    rows = {line.split()[-1]: line for line in said.splitlines() if line[:1].isdigit()}
    assert "finished" in rows["a"] and "skipped" in rows["a"]
    assert "interrupted" in rows["b"] and "resumes" in rows["b"]
    assert "failed" in rows["c"] and "left" in rows["c"]
    assert "c failed: no luck" in said and "hydra.sweeper.retry_failed=true" in said
    retried = Place()
    assert sweep.run(retried, retry_failed=True) == 0
    assert retried.started == ["c"]


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(sweep: Sweep) -> None:
    for job in sweep.jobs:
        made(job, Status.finished, 3)
    place = Place()
    assert sweep.run(place) == 0
    assert place.started == ["a", "b", "c"]


def test_a_pruned_and_a_cancelled_job_are_not_started_again(sweep: Sweep) -> None:
    a, b, c = sweep.jobs
    made(a, Status.pruned)
    made(b, Status.cancelled)
    made(c, Status.finished, 4)
    place = Place()
    assert sweep.run(place) == 75
    assert place.started == []


def test_one_bad_job_does_not_stop_the_others(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place({"b": [Run(BAD, writes=None)]})
    assert sweep.run(place) == 1
    assert place.started == ["a", "b", "c"]
    assert "[2/3] b failed after" in (said := capsys.readouterr().out) and "it broke" in said
    again = Place()
    assert sweep.run(again) == 1 and again.started == []


@pytest.mark.parametrize(
    ("run", "code"),
    [
        (Run(DONE, Status.interrupted, step=2), 75),  # its status file comes first
        (Run(DONE, Status.finished, step=2), 75),  # of fewer steps than were asked for
        (Run(DONE, None), 1),  # without a record of its own
        (Run(DONE, Status.failed), 1),
        (Run(CUT, None), 75),
        (Run(BAD, Status.running), 1),  # killed: it says nothing about its end
        (Run(BAD, Status.finished), 0),  # done, and the launcher lost sight of it
        (Run(CUT, Status.pruned), 0),
        (Run(CUT, Status.cancelled), 75),
    ],
)
def test_whose_word_counts(sweep: Sweep, run: Run, code: int) -> None:
    assert sweep.run(Place({"b": [run]})) == code


def test_what_a_run_said_before_it_was_started_does_not_count(sweep: Sweep) -> None:
    """A start that was refused leaves the status of the one before."""
    made(sweep.jobs[0], Status.interrupted)
    assert sweep.run(Place({"a": [Run(BAD, writes=None)]})) == 1


@pytest.mark.parametrize(("parallel", "asked", "most"), [(1, 2, 2), (None, None, 3), (2, 1, 1)])
def test_no_more_at_a_time_than_there_is_room(
    sweep: Sweep, parallel: int | None, asked: int | None, most: int
) -> None:
    runs = {name: [Run(looks=3)] for name in "abc"}
    place = Place(runs, parallel=parallel)
    assert sweep.run(place, max_parallel=asked) == 0
    assert place.most == most


def test_fail_fast_stops_those_that_run_and_starts_no_others(sweep: Sweep) -> None:
    place = Place({"a": [Run(BAD, None)], "b": [Run(looks=1000)]}, parallel=2)
    assert sweep.run(place, fail_fast=True) == 1
    assert place.started == ["a", "b"]
    assert [one.stops for one in place.handles] == [0, 1]


def test_fail_fast_counts_a_job_that_cannot_be_started(sweep: Sweep) -> None:
    place = Place({"a": [Run(looks=1000)]}, parallel=2, refuses=("b",))
    assert sweep.run(place, fail_fast=True) == 1
    assert place.started == ["a"] and place.handles[0].stops == 1


def test_a_dry_run_touches_nothing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place()
    assert sweep.run(place, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "would start a, b, c" in said and "nothing was started" in said
    assert place.started == [] and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({}, "hydra.launcher.partition"),
        ({"objective": "loss:up"}, "hydra.sweeper.objective"),
        ({"name": "../$(touch x)"}, "hydra.sweeper.name"),
        ({"name": "--flag"}, "hydra.sweeper.name"),
    ],
)
def test_what_keeps_it_from_running_is_said_before_anything_is_touched(
    sweep: Sweep, settings: dict[str, Any], path: str
) -> None:
    faults = [] if settings else [Problem(path, "x", "no such partition")]
    with pytest.raises(ConfigError) as refused:
        sweep.run(Place(faults=faults), **settings)
    assert [problem.path for problem in refused.value.problems] == [path]
    assert list(Path().iterdir()) == []


def test_the_limit_is_judged_with_the_jobs(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def problems(self: Place, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        asked.append(max_parallel)
        return []

    monkeypatch.setattr(Place, "problems", problems)
    assert sweep.run(Place(), max_parallel=2, dry_run=True) == 0
    assert asked == [2]


def test_a_job_that_cannot_be_started_is_tried_again_by_the_next_sweep(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(refuses=("b",))
    assert sweep.run(place) == 1
    assert place.started == ["a", "c"]
    assert "1 job was not started: no room here" in capsys.readouterr().out
    again = Place()
    assert sweep.run(again) == 0 and again.started == ["b"]


def test_what_a_sweep_before_started_is_waited_for(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = sweep.jobs
    place = Place(parallel=None)
    handed_over(a, place, Run(looks=3))
    handed_over(b, place, Run(CUT, Status.interrupted, looks=3, step=2))
    made(c, Status.finished, 4)
    assert sweep.run(place) == 0
    assert place.started == ["b"]  # cut off with its sweep, and gone on with
    assert capsys.readouterr().out.count("waits for job 17") == 2


def test_what_ended_while_nobody_looked_is_told_and_not_started_again(sweep: Sweep) -> None:
    a, b, _ = sweep.jobs
    place = Place()
    handed_over(a, place, Run(DONE))
    handed_over(b, place, Run(BAD, None))
    assert sweep.run(place) == 1
    assert place.started == ["c"]
    outcome = read_outcome(b.folder)
    assert outcome == BAD


def test_a_run_that_something_else_holds_is_waited_for(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(sweep.jobs[0], Status.running)
    looks: list[Path] = []

    def held(path: Path) -> bool:
        looks.append(path)
        if len(looks) == 6:
            made(sweep.jobs[0], Status.finished, 4)
        return True

    monkeypatch.setattr("sdx.record.status.is_held", held)
    place = Place()
    assert sweep.run(place) == 0
    assert place.started == ["b", "c"] and len(looks) >= 5


def test_a_detached_sweep_leaves_when_all_is_submitted(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {name: [Run(looks=1000)] for name in "abc"}
    place = Place(runs, parallel=None, takes_all=True, outlives_driver=True, detach=True)
    assert sweep.run(place) == 0
    said = capsys.readouterr().out
    assert "3 jobs go on without this process" in said
    assert f"python -m sdx.runs outputs/sweeps/{sweep.folder.name} --follow" in said
    assert [one.stops for one in place.handles] == [0, 0, 0]


def test_a_detached_sweep_does_not_hide_jobs_that_were_refused(sweep: Sweep) -> None:
    place = Place(parallel=None, takes_all=True, outlives_driver=True, detach=True, refuses=("b",))
    handed_over(sweep.jobs[0], place, Run(looks=1000))
    assert sweep.run(place) == 1


@pytest.mark.parametrize("is_dry", [True, False])
def test_a_dry_run_does_not_touch_what_is_half_handed_in(sweep: Sweep, is_dry: bool) -> None:
    """It would be taken back, or let go."""
    asked: list[str] = []

    class Asked(Place):
        def attach(self, job: Job, launch: Mapping[str, Any]) -> Running | None:
            asked.append(job.name)
            return None

    for job, released in zip(sweep.jobs[:2], (False, True), strict=True):
        job.folder.mkdir(parents=True)
        write_launch(job, NAME, "17", released=released)
    assert sweep.run(Asked(), dry_run=is_dry) == 0
    assert asked == (["b"] if is_dry else ["a", "b", "a", "b"])  # once more as they start


def test_a_job_that_another_sweep_started_meanwhile_is_waited_for(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both had looked before either had started it."""
    b = sweep.jobs[1]

    def other_starts_b() -> None:
        write_job(replace(b, sweep="other"), NAME)
        write_launch(b, NAME, "18")
        place.there["b"] = Running(b, Run(CUT, Status.interrupted, looks=2), id="18")

    place = Place({"a": [Run(act=other_starts_b)]})
    assert sweep.run(place) == 0
    assert place.started == ["a", "c", "b"]  # which its sweep leaves before it is done
    said = capsys.readouterr().out
    assert "[2/3] b was started elsewhere by the sweep other, job 18: waits for it" in said
    assert "[2/3] b was stopped where it ran: this sweep goes on with it" in said


def test_what_others_did_meanwhile_is_told_and_not_done_again(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    def others() -> None:
        made(sweep.jobs[1], Status.finished, 4)
        made(sweep.jobs[2], Status.failed, reason="no luck")

    place = Place({"a": [Run(act=others)]})
    assert sweep.run(place) == 1
    assert place.started == ["a"]
    said = capsys.readouterr().out
    assert "[2/3] b finished meanwhile" in said and "[3/3] c failed meanwhile, no luck" in said


def test_while_another_sweep_starts_its_jobs_this_one_does_not_even_look(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, waited = threading.Event(), threading.Event()
    looks: list[bool] = []
    sleep, look = time.sleep, driver.look

    def wait(seconds: float) -> None:
        waited.set()
        sleep(seconds)

    def looking(*given: Any) -> Any:
        looks.append(waited.is_set())
        return look(*given)

    def other() -> None:
        with turn(sweep.jobs[0].folder.parent):
            entered.set()
            assert waited.wait(60)

    monkeypatch.setattr("sdx_launchers.sweep.turn.time.sleep", wait)
    monkeypatch.setattr(driver, "look", looking)
    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    assert sweep.run(Place()) == 0
    thread.join()
    assert looks == [True]


def test_the_end_of_a_job_is_not_noted_where_another_sweep_has_started_it_again(
    sweep: Sweep,
) -> None:
    a = sweep.jobs[0]
    place = Place({"a": [Run(CUT, None, act=lambda: write_job(replace(a, sweep="other"), NAME))]})
    assert sweep.run(place) == 75
    assert read_outcome(a.folder) is None and read_outcome(sweep.jobs[1].folder) == DONE


def test_a_job_is_started_when_its_store_says_again_how_it_stands(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, asked = course.look, [0]

    def at_times(*given: Any) -> Any:
        asked[0] += 1
        if asked[0] == 2:
            raise StoreError("s3://bucket: does not answer.", may_pass=True)
        return look(*given)

    monkeypatch.setattr(course, "look", at_times)
    place = Place()
    assert sweep.run(place) == 0
    assert place.started == ["a", "b", "c"] and asked == [4]


def test_fail_fast_is_refused_where_nobody_stays_to_stop_the_others(sweep: Sweep) -> None:
    with pytest.raises(ConfigError) as refused:
        sweep.run(Place(detach=True), fail_fast=True)
    assert str(refused.value.problems[0]) == (
        "hydra.sweeper.fail_fast=true: must be false with hydra.launcher.detach=true: nobody stays "
        "to stop the others; drop one of the two."
    )
    assert list(Path().iterdir()) == []


def test_a_store_that_does_not_answer_for_a_while_ends_no_sweep(sweep: Sweep) -> None:
    def away() -> None:
        if place.handles[0].looks == 1:
            raise StoreError("s3://bucket: does not answer.", may_pass=True)

    place = Place({"a": [Run(act=away)]})
    assert sweep.run(place) == 0
    assert place.started == ["a", "b", "c"] and place.handles[0].looks == 2


def test_a_start_hears_nothing_of_what_its_run_was_asked_before(sweep: Sweep) -> None:
    """It may crash before its run comes to forget it."""
    job = sweep.jobs[0]
    made(job, Status.cancelled)
    request_stop(job.paths, Status.cancelled, "by hand")
    asked: list[object] = []
    place = Place({"a": [Run(act=lambda: asked.append(read_stop(job.paths)))]})
    assert sweep.run(place, retry_failed=True) == 0
    assert place.started == ["a", "b", "c"] and asked == [None]


def test_code_that_cannot_be_copied_is_no_traceback(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> str:
        raise SnapshotError("outputs/snapshots: takes no snapshot")

    monkeypatch.setattr(Place, "describe", full)
    assert sweep.run(Place(), dry_run=True) == driver.REFUSED
    assert "outputs/snapshots: takes no snapshot" in capsys.readouterr().err
    monkeypatch.setattr(Place, "start", full)
    assert sweep.run(Place()) == driver.FAILED


def test_records_that_cannot_be_written_end_no_other_job(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk: here folders are in the way."""
    a, b, _ = sweep.jobs
    (b.folder / "config.yaml").mkdir(parents=True)
    in_the_way = a.folder / "outcome.json" / "x"
    place = Place({"a": [Run(act=lambda: in_the_way.mkdir(parents=True))]})
    assert sweep.run(place) == driver.FAILED and place.started == ["a", "c"]
    said = capsys.readouterr().out
    assert "a finished" in said and "1 job was not started: " in said and "config.yaml" in said


def test_a_turn_that_cannot_be_had_is_no_traceback(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = sweep.jobs[0].folder.parent / ".lock.json"
    place = Place({"a": [Run(act=lambda: lock.mkdir())]})
    assert sweep.run(place) == driver.FAILED and place.started == ["a"]
    said = capsys.readouterr().out
    assert "a finished" in said and said.count("1 job was not started: ") == 2


def test_a_folder_that_no_path_of_python_can_name_is_refused(sweep: Sweep) -> None:
    for one in sweep.request.jobs:
        one.config.run = replace(one.config.run, output_dir="a:b")  # type: ignore[misc]
    with pytest.raises(ConfigError, match="PYTHONPATH takes no : in a folder"):
        sweep.run(Place())


def test_values_in_brackets_are_shown_as_they_are(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    for one, value in zip(sweep.request.jobs, ("[unet]", "[unet,text]", "[/unet]"), strict=True):
        one.overrides[:] = [f"train.parts={value}"]
    assert sweep.run(Place(), dry_run=True) == 0
    said = capsys.readouterr().out
    assert " [unet] " in said and " [unet,text] " in said and " [/unet] " in said


def interrupting(times: int) -> Callable[[], None]:
    """Ctrl-C, that often, a look at a time."""
    left = [times]

    def act() -> None:
        if left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)

    return act


def test_ctrl_c_asks_the_jobs_to_save(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    place = Place({"a": [Run(looks=1000, act=interrupting(1))]})
    assert sweep.run(place) == 75
    assert place.started == ["a"] and place.handles[0].stops == 1
    said = capsys.readouterr().out
    assert "1 job saves and ends; Ctrl-C again ends it at once" in said
    assert said.endswith("The same command goes on with what is not done.\n")
    assert read_json(sweep.folder / "summary.json") is not None
    assert signal.getsignal(signal.SIGINT) is before
    again = Place()
    assert sweep.run(again) == 0 and again.started == ["a", "b", "c"]


def test_a_second_ctrl_c_ends_them_at_once(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poll(self: Running) -> Ended | None:
        self.run.act()
        return CUT if self.stops > 1 else None

    monkeypatch.setattr(Running, "poll", poll)
    assert sweep.run(Place({"a": [Run(act=interrupting(2))]})) == 75
    said = capsys.readouterr().out
    assert "1 job saves and ends; Ctrl-C again" in said and "1 job is ended at once" in said
    assert said.count("Ctrl-C again") == 1


def test_ctrl_c_does_not_touch_the_job_of_another_sweep(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    b = sweep.jobs[1]
    place = Place({"a": [Run(looks=1000, act=interrupting(1))]}, parallel=2)
    write_job(replace(b, sweep="other"), NAME)
    write_launch(b, NAME, "17")
    place.there["b"] = Running(b, Run(looks=1000))
    assert sweep.run(place) == 75
    assert place.handles[0].stops == 1 and place.there["b"].stops == 0
    assert read_outcome(b.folder) is None, "it has not ended"
    said = capsys.readouterr().out
    assert "[2/3] b goes on elsewhere, without this sweep" in said
    assert "1 job saves and ends" in said


def test_ctrl_c_leaves_jobs_that_outlive_the_sweep_alone(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {name: [Run(looks=1000)] for name in "abc"}
    runs["a"][0].act = interrupting(1)
    place = Place(runs, parallel=None, takes_all=True, outlives_driver=True)
    assert sweep.run(place) == 75
    assert [one.stops for one in place.handles] == [0, 0, 0]
    assert "--cancel" in capsys.readouterr().out


def test_a_second_process_of_the_same_sweep_is_refused(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    second = Place()
    place = Place({"a": [Run(act=lambda: codes.append(sweep.run(second)))]})
    assert sweep.run(place) == 0
    assert codes == [2] and second.started == [] and place.started == ["a", "b", "c"]
    assert "another process runs this sweep" in capsys.readouterr().err


def test_a_cancelled_sweep_starts_no_more(sweep: Sweep) -> None:
    place = Place({"a": [Run(CUT, Status.cancelled, act=lambda: ask_to_cancel(sweep.folder))]})
    assert sweep.run(place) == 75
    assert place.started == ["a"]


def test_encodings_are_always_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They find by themselves what is encoded, keep no status, and are not waited for by the runs
    that have the same configuration."""
    monkeypatch.chdir(tmp_path)
    sweep, training = make_sweep("encode"), make_sweep("train")
    for job in sweep.jobs:
        job.folder.mkdir(parents=True)
        write_outcome(job, BAD)
    place = Place({job.name: [Run(DONE, None)] for job in sweep.jobs})
    assert sweep.run(place) == 0
    assert place.started == ["encode-a", "encode-b", "encode-c"]
    assert not {job.folder for job in sweep.jobs} & {job.folder for job in training.jobs}


def test_the_manifest_says_what_the_sweep_is(sweep: Sweep) -> None:
    sweep.run(Place(), objective="loss:min")
    manifest = read_json(sweep.folder / "sweep.json")
    assert manifest is not None
    assert (manifest["command"], manifest["launcher"]) == ("train", NAME)
    assert manifest["objective"] == "loss:min" and manifest["overrides"] == ["run.seed=0,1,2"]
    job = manifest["jobs"][1]
    assert job["name"] == "b" and job["run"] == str(Path("outputs/b").absolute())
    told = read_json(Path(job["launch"]) / "job.json")
    assert told is not None and told["overrides"] == ["run.seed=1"]
    assert Path(job["launch"]).stat().st_mode & 0o777 == 0o700


def test_a_sweeper_of_someone_else_gets_values_and_an_exit_code(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job, value in zip(sweep.jobs, (0.5, 0.25), strict=False):
        job.paths.root.mkdir(parents=True)
        row = json.dumps({"step": 1, "validation_loss": value})
        write_text(job.paths.metrics, f"{row}\n")
    place = Place({"a": [Run()], "b": [Run(BAD, None)], "c": [Run()]})
    monkeypatch.setattr(driver, "make_launcher", lambda name, settings: place)
    settings: Any = None
    found = driver.launch(sweep.request, NAME, settings, [["run.seed=0"]])
    assert found == [0.5, 0.25, None] and sweep.request.exit_code == 1
