"""What the launcher does with the answers of a scheduler, those included that do not come."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sdx.config.launching import SlurmSettings
from sdx.record.paths import RunPaths
from sdx.record.snapshot import Snapshot
from sdx.record.status import Status, write_status
from sdx.record.stop_request import read_stop
from sdx_launchers.jobs import Ended, Job, LaunchError
from sdx_launchers.launch_record import read_launch, write_job, write_launch
from sdx_launchers.slurm import launcher as slurm
from sdx_launchers.slurm import queue as slurm_queue
from sdx_launchers.slurm.launcher import SlurmHandle, SlurmLauncher
from sdx_launchers.slurm.queue import Queue, SchedulerError, accounted, named, queued
from tests.launchers.slurm_jobs import make_job, make_settings, put_on_path, slurm_config

pytestmark = pytest.mark.fast


class Slurm:
    """A scheduler of answers: what its commands print, by line."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.squeue: list[str] = []
        self.sacct: list[str] | None = None
        self.sinfo: list[str] = []
        self.names: dict[str, str] = {}
        """Ids of what is queued, by name."""
        self.is_silent = False

    def call(self, *argv: str) -> str:
        self.calls.append(argv)
        if self.is_silent:
            raise SchedulerError("Unable to contact slurm controller")
        if argv[0] == "sacct" and self.sacct is None:
            raise SchedulerError("Slurm accounting storage is disabled")
        name = next((word[7:] for word in argv if word.startswith("--name=")), None)
        if name is not None:
            return f"{self.names[name]}|{self.names[name]}\n" if name in self.names else ""
        rows = {"squeue": self.squeue, "sacct": self.sacct, "sinfo": self.sinfo}.get(argv[0]) or []
        return "\n".join(rows) + "\n"

    def made(self, program: str) -> list[tuple[str, ...]]:
        return [argv[1:] for argv in self.calls if argv[0] == program]

    def submit(self, submission: Any, settings: SlurmSettings) -> list[str]:
        """Instead of submitit and sbatch."""
        id = str(10 + len(self.names))
        self.calls.append(("sbatch", submission.name))
        self.names[submission.name] = id
        submission.folder.mkdir(parents=True)
        return submission.ids(id)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Slurm:
    fake = Slurm()
    monkeypatch.setattr(slurm_queue, "call", fake.call)
    monkeypatch.setattr(slurm, "submit", fake.submit)
    monkeypatch.setattr(slurm, "take_snapshot", lambda folder: Snapshot(folder / "code", "c", None))
    monkeypatch.setenv("PATH", put_on_path(tmp_path / "bin", sbatch="exit 1"))
    return fake


def jobs_in(root: Path, *names: str, **how: Any) -> list[Job]:
    jobs = [make_job(name, root=root, **how) for name in names]
    for job in jobs:
        write_job(job, "sdx_slurm")
    return jobs


def handle_of(
    root: Path, id: str = "7", fresh_s: float = 0.0, grace_s: float = 60.0
) -> SlurmHandle:
    [job] = jobs_in(root, "a")
    write_launch(job, "sdx_slurm", id, name="sdx-a", logs=[str(root / "log")], released=True)
    launch = read_launch(job.folder)
    assert launch is not None
    return SlurmHandle(job, launch, Queue(fresh_s), grace_s)


def test_jobs_are_written_down_before_they_may_start(
    scheduler: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_in(tmp_path, "a", "b", "c")
    at_release: list[list[dict[str, Any] | None]] = []

    def release(id: str) -> None:
        scheduler.calls.append(("release", id))
        at_release.append([read_launch(job.folder) for job in jobs])

    monkeypatch.setattr(slurm_queue, "release", release)
    handles = SlurmLauncher(make_settings()).start(jobs, max_parallel=2)
    assert [handle.id for handle in handles] == ["10_0", "10_1", "10_2"]
    assert [call for call in scheduler.calls if call[0] == "release"] == [("release", "10")]
    [launches] = at_release
    for job, id, launch in zip(jobs, ("10_0", "10_1", "10_2"), launches, strict=True):
        assert launch is not None and launch["id"] == id and launch["released"] is False
        after = read_launch(job.folder)
        assert after is not None and after["released"] is True and len(after["logs"]) == 1


def test_ids_are_said_at_once(scheduler: Slurm, tmp_path: Path, capsys: Any) -> None:
    SlurmLauncher(make_settings()).start(jobs_in(tmp_path, "a", "b"), None)
    said = capsys.readouterr().out
    assert "SLURM job 10_0: a" in said and "SLURM job 10_1: b" in said


def test_jobs_on_other_hardware_are_another_array(scheduler: Slurm, tmp_path: Path) -> None:
    small = jobs_in(tmp_path, "a", "b")
    large = jobs_in(tmp_path, "c", config=slurm_config("gpu_a100_8"))
    launcher = SlurmLauncher(make_settings())
    handles = launcher.start([small[0], *large, small[1]], None)
    assert [handle.id for handle in handles] == ["10_0", "11", "10_1"]
    assert launcher.problems([*small, *large], None) == []
    assert launcher.problems(small, 1) == []
    [problem] = launcher.problems([*small, *large], 1)
    assert "hydra.sweeper.max_parallel=1" in str(problem) and "2 arrays" in str(problem)


@pytest.mark.parametrize("is_silent", [False, True])
def test_what_is_refused_leaves_nothing_queued(
    scheduler: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_silent: bool
) -> None:
    def submit(submission: Any, settings: SlurmSettings) -> Sequence[str]:
        ids = scheduler.submit(submission, settings)
        if len(scheduler.names) == 2:
            scheduler.is_silent = is_silent
            raise LaunchError("sbatch: error: Job violates accounting policy")
        return ids

    monkeypatch.setattr(slurm, "submit", submit)
    jobs = jobs_in(tmp_path, "a") + jobs_in(tmp_path, "b", config=slurm_config("gpu_a100_8"))
    words = "held and never starts" if is_silent else "nothing is queued"
    with pytest.raises(LaunchError, match=f"accounting policy; .*{words}"):
        SlurmLauncher(make_settings()).start(jobs, None)
    assert not any(argv[1] == "release" for argv in scheduler.calls)
    if not is_silent:
        assert scheduler.made("scancel") == [("10",), ("11",)]
        assert [read_launch(job.folder) for job in jobs] == [None, None]


def test_no_sbatch_here(scheduler: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher, jobs = SlurmLauncher(make_settings()), jobs_in(tmp_path, "a")
    with pytest.raises(LaunchError, match="no sbatch"):
        launcher.start(jobs, None)
    assert "#SBATCH --array=0-1%1" in launcher.describe(jobs_in(tmp_path, "a", "b"), 1)
    assert not (tmp_path / "sweeps").exists() and not (tmp_path / "snapshots").exists()


def test_a_launcher_killed_before_it_knew_the_id_leaves_a_held_job_that_is_taken_back(
    scheduler: Slurm, tmp_path: Path
) -> None:
    [job] = jobs_in(tmp_path, "a")
    scheduler.names["sdx-mine"] = "12"
    assert SlurmLauncher(make_settings()).attach(job, {"id": "", "name": "sdx-mine"}) is None
    assert scheduler.made("scancel") == [("12",)]


def test_one_killed_before_the_release_leaves_a_job_that_the_next_one_releases(
    scheduler: Slurm, tmp_path: Path
) -> None:
    [job] = jobs_in(tmp_path, "a")
    scheduler.squeue = ["12_3|PENDING|JobHeldUser"]
    write_launch(job, "sdx_slurm", "12_3", name="n", logs=["log"], released=False)
    launch = read_launch(job.folder)
    assert launch is not None
    handle = SlurmLauncher(make_settings()).attach(job, launch)
    assert handle is not None and handle.poll() is None
    assert scheduler.made("scontrol") == [("release", "12_3")]
    after = read_launch(job.folder)
    assert after is not None and after["released"] is True


def test_one_squeue_serves_all_jobs_while_it_is_fresh(scheduler: Slurm) -> None:
    scheduler.squeue = [f"7_{n}|RUNNING|None" for n in range(50)]
    queue = Queue(fresh_s=3600.0)
    states = [queue.state(f"7_{n}") for n in range(50)]
    assert {state.state for state in states if state} == {"RUNNING"}
    assert len(scheduler.made("squeue")) == 1 and scheduler.made("sacct") == []
    queue.refresh()
    queue.state("7_0")
    assert len(scheduler.made("squeue")) == 2


def test_a_silent_scheduler_loses_no_job(scheduler: Slurm, tmp_path: Path, capsys: Any) -> None:
    handle = handle_of(tmp_path)
    scheduler.is_silent = True
    assert [handle.poll() for _ in range(3)] == [None] * 3
    scheduler.is_silent = False
    scheduler.squeue = ["7|RUNNING|None"]
    assert handle.poll() is None
    scheduler.is_silent = True
    assert handle.poll() is None, "and what it said before is no news"
    said = capsys.readouterr().err
    assert said.count("does not answer") == 2 and said.count("answers again") == 1
    scheduler.is_silent = False
    scheduler.squeue = ["7|COMPLETED|None"]
    assert handle.poll() == Ended(Status.finished)


@pytest.mark.parametrize(
    "state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"]
)
def test_a_job_goes_on(scheduler: Slurm, tmp_path: Path, state: str) -> None:
    scheduler.squeue = [f"7|{state}|None"]
    assert handle_of(tmp_path).poll() is None


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("COMPLETED", Status.finished),
        ("CANCELLED", Status.cancelled),
        ("TIMEOUT", Status.interrupted),
        ("PREEMPTED", Status.interrupted),
        ("NODE_FAIL", Status.interrupted),
        ("FAILED", Status.failed),
        ("OUT_OF_MEMORY", Status.failed),
        ("BOOT_FAIL", Status.failed),
    ],
)
@pytest.mark.parametrize("is_forgotten", [False, True])
def test_how_a_job_ended(
    scheduler: Slurm, tmp_path: Path, state: str, status: Status, is_forgotten: bool
) -> None:
    """By squeue, and when that has forgotten it by sacct."""
    scheduler.squeue = ["8|RUNNING|None"] if is_forgotten else [f"7|{state}|None"]
    scheduler.sacct = [f"7|{state} by 1000" if state == "CANCELLED" else f"7|{state}"]
    ended = handle_of(tmp_path).poll()
    assert ended is not None and ended.status is status
    if status is not Status.finished:
        assert ended.reason == f"SLURM says {state}"


def test_the_script_of_a_job_tells_why_it_failed(scheduler: Slurm, tmp_path: Path) -> None:
    handle = handle_of(tmp_path)
    scheduler.squeue = ["7|FAILED|NonZeroExitCode"]
    note(handle.job, id="7", code=75, reason="interrupted; it went on 20 times before")
    assert handle.poll() == Ended(Status.interrupted, "interrupted; it went on 20 times before")


def note(job: Job, **fields: Any) -> None:
    (job.folder / "ended.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("sacct", [None, [], ["7|RUNNING"]])
def test_without_accounting_its_files_tell(
    scheduler: Slurm, tmp_path: Path, sacct: list[str] | None
) -> None:
    """An accounting that is behind counts as none."""
    scheduler.sacct = sacct
    handle = handle_of(tmp_path)
    note(handle.job, id="6", code=1, reason="of a job before this one")
    assert handle.poll() == Ended(Status.interrupted, "SLURM knows no job 7 any more")
    note(handle.job, id="7", code=0, reason="finished")
    assert handle.poll() == Ended(Status.finished)
    note(handle.job, id="7", code=1, reason="exit code 1 (n1: task 1)")
    assert handle.poll() == Ended(Status.failed, "exit code 1 (n1: task 1)")


def test_without_accounting_and_a_word_of_its_script_its_run_tells(
    scheduler: Slurm, tmp_path: Path
) -> None:
    handle = handle_of(tmp_path)
    paths = RunPaths(tmp_path / "a")
    paths.root.mkdir()
    write_status(paths, Status.interrupted, step=3, reason="SIGTERM")
    assert handle.poll() == Ended(Status.interrupted, "SIGTERM")


def test_a_job_just_handed_in_is_not_given_up(scheduler: Slurm, tmp_path: Path) -> None:
    """A busy controller tells of it later."""
    [job] = jobs_in(tmp_path, "a")
    [handle] = SlurmLauncher(make_settings()).start([job], None)
    assert handle.poll() is None


def test_a_held_job_is_said_once(scheduler: Slurm, tmp_path: Path, capsys: Any) -> None:
    handle = handle_of(tmp_path)
    scheduler.squeue = ["7|PENDING|launch failed requeued held"]
    assert [handle.poll(), handle.poll()] == [None, None]
    assert capsys.readouterr().err.count("scontrol release 7") == 1


def test_a_job_that_waits_is_taken_out_of_the_queue(scheduler: Slurm, tmp_path: Path) -> None:
    handle = handle_of(tmp_path)
    scheduler.squeue = ["7|PENDING|Resources"]
    handle.stop()
    assert scheduler.made("scancel") == [("7",)]
    assert (handle.job.folder / "stopped").exists()
    scheduler.squeue = ["7|CANCELLED|None"]
    ended = handle.poll()
    assert ended is not None and ended.status is Status.interrupted, "the same command starts it"


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_job_that_was_stopped_while_it_went_back_into_the_queue(
    scheduler: Slurm, tmp_path: Path, is_ours: bool
) -> None:
    """Its script ends at once, with an exit code that SLURM calls a failure."""
    stopping = handle_of(tmp_path)
    scheduler.squeue = ["7|COMPLETING|None"]
    stopping.stop()
    other = handle_of(tmp_path)
    scheduler.squeue = ["7|FAILED|NonZeroExitCode"]
    ended = (stopping if is_ours else other).poll()
    assert ended == Ended(Status.interrupted if is_ours else Status.cancelled, "stopped")


def test_what_is_being_handed_in_is_not_taken_back_by_those_who_look(
    scheduler: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sdx.runs asks nothing about jobs that are not released."""
    jobs = jobs_in(tmp_path, "a")

    def submit(submission: Any, settings: SlurmSettings) -> list[str]:
        launch = read_launch(jobs[0].folder)
        assert launch is not None and launch["released"] is False and launch["id"] == ""
        return scheduler.submit(submission, settings)

    monkeypatch.setattr(slurm, "submit", submit)
    SlurmLauncher(make_settings()).start(jobs, None)


def test_a_running_job_is_asked_to_save_and_then_cancelled(
    scheduler: Slurm, tmp_path: Path
) -> None:
    handle = handle_of(tmp_path, grace_s=0.0)
    paths = RunPaths(tmp_path / "a")
    paths.root.mkdir()
    write_status(paths, Status.interrupted, step=0)
    scheduler.squeue = ["7|RUNNING|None"]
    handle.stop()
    request = read_stop(paths)
    assert request is not None and request.status is Status.interrupted
    assert scheduler.made("scancel") == []
    time.sleep(0.001)
    assert handle.poll() is None and handle.poll() is None
    assert scheduler.made("scancel") == [("7",)], "its grace is over"


def test_one_that_is_stopped_twice_is_cancelled(scheduler: Slurm, tmp_path: Path) -> None:
    handle = handle_of(tmp_path)
    scheduler.squeue = ["7|RUNNING|None"]
    handle.stop()
    assert scheduler.made("scancel") == [("--signal=TERM", "7")], "its run is not there yet"
    handle.stop()
    assert scheduler.made("scancel")[1:] == [("7",)]


def test_partitions_are_asked_for(scheduler: Slurm, tmp_path: Path) -> None:
    scheduler.sinfo = ["main", "long"]
    launcher = SlurmLauncher(make_settings(partition="gpu,main"))
    [problem] = launcher.problems(jobs_in(tmp_path, "a"), None)
    assert problem.path == "hydra.launcher.partition" and problem.got == "gpu"
    assert "long, main" in str(problem)


def test_nothing_is_asked_of_a_cluster_that_is_not_there(scheduler: Slurm, tmp_path: Path) -> None:
    scheduler.is_silent = True
    launcher = SlurmLauncher(make_settings(partition="gpu"))
    assert launcher.problems(jobs_in(tmp_path, "a"), None) == []


def test_what_squeue_and_sacct_print_is_read(scheduler: Slurm) -> None:
    scheduler.squeue = ["7_0|RUNNING|None", " 8|PENDING|(Nodes|down)", "", "junk"]
    scheduler.sacct = ["7_1|CANCELLED by 0", "7_2|"]
    found = queued()
    assert found["7_0"].state == "RUNNING" and found["8"].reason == "(Nodes|down)"
    assert len(found) == 2
    assert {id: one.state for id, one in accounted({"7_1", "7_2"}).items()} == {"7_1": "CANCELLED"}
    assert scheduler.made("sacct")[0][-1] == "--jobs=7_1,7_2"
    assert named("unknown") == []


def test_a_command_that_is_not_there_or_fails(tmp_path: Path, monkeypatch: Any) -> None:
    path = put_on_path(tmp_path / "bin", squeue="echo 'slurm_load_jobs error: x' >&2; exit 1")
    monkeypatch.setenv("PATH", path)
    with pytest.raises(SchedulerError, match="slurm_load_jobs error: x"):
        queued()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SchedulerError, match="there is no squeue"):
        queued()
