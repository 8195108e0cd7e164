"""Jobs of a SLURM cluster: handed in through submitit, followed through squeue and their files.

Jobs that ask for the same are one array, which keeps to `max_parallel` itself. All are handed in
held, written down with their ids, and only then released: a launcher that is killed on the way
leaves nothing that runs and nobody knows of. What a job does about time limits, preemptions and
crashes is in its script (slurm_script.py, slurm_after.py), so it goes on without a launcher.
"""

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from sdx.config.errors import Problem
from sdx.config.launching import SlurmSettings
from sdx.record.files import read_json
from sdx.record.snapshot import take_snapshot
from sdx.record.status import Status, read_status
from sdx.record.stop_request import read_stop, request_stop
from sdx_launchers import slurm_queue
from sdx_launchers.jobs import Ended, Job, LaunchError
from sdx_launchers.launch_record import SNAPSHOTS, SWEEPS, record_root, write_launch
from sdx_launchers.slurm_queue import JobState, Queue, SchedulerError
from sdx_launchers.slurm_request import Request, job_problems, request_of, settings_problems
from sdx_launchers.slurm_script import (
    CANCELLED,
    COUNTS,
    ENDED,
    Submission,
    discard,
    render,
    submit,
)

NAME = "sdx_slurm"
_SUBMISSIONS = "slurm"  # in a sweep's folder
_BY_STATE = {
    "COMPLETED": Status.finished,
    "CANCELLED": Status.cancelled,
    "TIMEOUT": Status.interrupted,
    "PREEMPTED": Status.interrupted,
    "NODE_FAIL": Status.interrupted,
    "DEADLINE": Status.interrupted,
    "REVOKED": Status.interrupted,
}
"""SLURM's final states; the others are failures."""
_BY_CODE = {0: Status.finished, 75: Status.interrupted}
_SILENT_FOR_S = 60.0  # before a job that nobody knows is given up: files of a cluster come late


class SlurmLauncher:
    """hydra/launcher=sdx_slurm."""

    parallel = None
    takes_all = True
    outlives_driver = True

    def __init__(self, settings: SlurmSettings):
        self._settings = settings
        self.poll_s = settings.poll_s
        self.detach = settings.detach
        self._queue = Queue(settings.poll_s / 2)

    def problems(self, jobs: Sequence[Job]) -> list[Problem]:
        """Values and hardware that cannot be, and a partition that this cluster does not have."""
        found = [*settings_problems(self._settings), *job_problems(self._settings, jobs)]
        return found or _partition_problems(self._settings)

    def describe(self, jobs: Sequence[Job], max_parallel: int | None) -> str:
        """The batch scripts, as `start` would hand them in."""
        if not jobs:
            return ""
        folder = record_root(jobs[0].config) / SNAPSHOTS
        with tempfile.TemporaryDirectory() as aside:
            snapshot = take_snapshot(Path(aside))
            python_path = [
                folder / path.relative_to(Path(aside).absolute()) for path in snapshot.python_path
            ]
        texts = []
        for submission in self._submissions(jobs, max_parallel, python_path):
            names = ", ".join(job.name for job in submission.jobs)
            texts.append(f"# sbatch, for {names}:\n{render(submission, self._settings)}")
        return "\n\n".join(texts)

    def start(self, jobs: Sequence[Job], max_parallel: int | None) -> Sequence["SlurmHandle"]:
        if not jobs:
            return []
        snapshot = take_snapshot(record_root(jobs[0].config) / SNAPSHOTS)
        submissions = self._submissions(jobs, max_parallel, snapshot.python_path)
        handles: dict[str, SlurmHandle] = {}
        released: list[str] = []
        try:
            for submission in submissions:
                handles |= self._hand_in(submission)
            for handle in handles.values():
                released.append(handle.id)
                handle.release()
        except BaseException as error:
            _take_back(submissions, jobs)
            if isinstance(error, SchedulerError):
                raise LaunchError(f"hydra/launcher={NAME}: {error}; nothing is queued.") from error
            raise
        return [handles[job.name] for job in jobs]

    def attach(self, job: Job, launch: Mapping[str, Any]) -> "SlurmHandle | None":
        """A job that is queued, or that ended and nobody has been told of; None for one that was
        never released, which is taken back."""
        id = launch.get("id")
        if not id:
            with suppress(SchedulerError):
                slurm_queue.cancel(*slurm_queue.named(launch["name"]))
            return None
        handle = SlurmHandle(job, id, self._queue, self._settings, launch)
        if not launch.get("released"):
            handle.release()
        return handle

    def __enter__(self) -> "SlurmLauncher":
        return self

    def __exit__(self, *error: object) -> None:
        """Jobs go on; `sdx.runs --follow` and `--cancel` find them."""

    def _submissions(
        self, jobs: Sequence[Job], max_parallel: int | None, python_path: Sequence[PurePath]
    ) -> list[Submission]:
        """An array, or a single job, for each request there is."""
        by_request: dict[Request, list[Job]] = {}
        for job in jobs:
            request = request_of(self._settings, job.config.hardware)
            by_request.setdefault(request, []).append(job)
        if len(by_request) > 1 and max_parallel is not None:
            raise LaunchError(
                f"hydra.sweeper.max_parallel={max_parallel}: jobs on different hardware are "
                f"{len(by_request)} arrays, each with its own limit; leave it out, or sweep each "
                "hardware for itself."
            )
        folder = record_root(jobs[0].config) / SWEEPS / jobs[0].sweep / _SUBMISSIONS
        number = 1 + sum(1 for _ in folder.glob("*"))
        submissions = []
        for request, group in by_request.items():
            own = folder / str(number)
            name = _job_name(jobs[0].sweep, own)
            submissions.append(Submission(name, own, group, request, max_parallel, python_path))
            number += 1
        return submissions

    def _hand_in(self, submission: Submission) -> dict[str, "SlurmHandle"]:
        for job in submission.jobs:
            for stale in (CANCELLED, COUNTS, ENDED):
                (job.folder / stale).unlink(missing_ok=True)
            write_launch(job, NAME, "", name=submission.name, released=False)
        ids = submit(submission, self._settings)
        handles = {}
        for job, id in zip(submission.jobs, ids, strict=True):
            logs = [str(path) for path in submission.logs(id)]
            launch = {"name": submission.name, "logs": logs}
            write_launch(job, NAME, id, **launch, released=False)
            print(f"sdx: SLURM job {id}: {job.name}, log {logs[0]}", flush=True)
            handles[job.name] = SlurmHandle(job, id, self._queue, self._settings, launch)
        return handles


class SlurmHandle:
    """A job that was handed in, by this process or one before it."""

    def __init__(
        self,
        job: Job,
        id: str,
        queue: Queue,
        settings: SlurmSettings,
        launch: Mapping[str, Any],
    ):
        self.job = job
        self.id = id
        self._queue = queue
        self._launch = launch
        self._grace_s = settings.signal_delay_s
        self._stopped_at: float | None = None
        self._unknown_since: float | None = None
        self._was_held = False

    def poll(self) -> Ended | None:
        state = self._queue.state(self.id)
        if self._stopped_at is not None and time.monotonic() - self._stopped_at > self._grace_s:
            self._cancel()
        if state is None and not self._queue.is_silent:
            return self._told_by_files()
        self._unknown_since = None
        if state is None or state.goes_on:
            self._say_held(state)
            return None
        self._queue.forget(self.id)
        return self._ended(state)

    def stop(self) -> None:
        """Keeps it from being requeued, and takes it out of the queue where it waits."""
        (self.job.folder / CANCELLED).touch()
        state = self._queue.state(self.id)
        if self._stopped_at is not None or state is None or state.is_waiting:
            self._cancel()
            return
        self._stopped_at = time.monotonic()
        if self.job.command != "train":
            self._signal()
        elif read_stop(self.job.paths) is None:
            request_stop(self.job.paths, Status.interrupted, "stopped by its sweep")

    def release(self) -> None:
        """Lets it start; notes that nothing holds it any more."""
        slurm_queue.release(self.id)
        fields = {name: self._launch[name] for name in ("name", "logs")}
        write_launch(self.job, NAME, self.id, **fields, released=True)

    def _cancel(self) -> None:
        self._stopped_at = None
        with suppress(SchedulerError):  # it ended meanwhile
            slurm_queue.cancel(self.id)

    def _signal(self) -> None:
        with suppress(SchedulerError):
            slurm_queue.cancel("--signal=TERM", self.id)

    def _say_held(self, state: JobState | None) -> None:
        is_held = state is not None and state.is_held
        if state is not None and is_held and not self._was_held:
            text = f"sdx: SLURM holds job {self.id} ({state.reason}); scontrol release {self.id}"
            print(text, file=sys.stderr, flush=True)
        self._was_held = is_held

    def _ended(self, state: JobState) -> Ended:
        """What the scheduler says, with the words of the job's script where those are there."""
        status = _BY_STATE.get(state.state, Status.failed)
        if status is Status.finished:
            return Ended(status)
        noted = self._noted()
        if status is not Status.failed or noted is None:
            return Ended(status, f"SLURM says {state.state}")
        return Ended(_BY_CODE.get(noted["code"], Status.failed), noted["reason"])

    def _told_by_files(self) -> Ended | None:
        """Of a job that SLURM has forgotten, or has not heard of yet."""
        noted = self._noted()
        if noted is not None:
            reason = noted["reason"] if noted["code"] else None
            return Ended(_BY_CODE.get(noted["code"], Status.failed), reason)
        now = time.monotonic()
        self._unknown_since = self._unknown_since or now
        status = read_status(self.job.paths) if self.job.command == "train" else None
        if status is not None and status.status is Status.running:
            return None
        if now - self._unknown_since < _SILENT_FOR_S and not self._is_old():
            return None
        if status is None:
            return Ended(Status.interrupted, f"SLURM knows no job {self.id} any more")
        return Ended(status.status, status.reason)

    def _is_old(self) -> bool:
        """Whether another process handed it in: nothing about it is on its way any more."""
        return "submitted" in self._launch

    def _noted(self) -> dict[str, Any] | None:
        """What the job's script wrote at its end, of this very job."""
        noted = read_json(self.job.folder / ENDED)
        return noted if noted is not None and noted["id"] == self.id else None


def _partition_problems(settings: SlurmSettings) -> list[Problem]:
    """Asked only where there is a cluster: a dry run on a laptop has none."""
    if settings.partition is None:
        return []
    try:
        known = slurm_queue.partitions()
    except SchedulerError:
        return []
    path = "hydra.launcher.partition"
    missing = [name for name in settings.partition.split(",") if name not in known]
    fix = f"use {', '.join(sorted(known))}"
    return [Problem(path, name, "this cluster has no such partition", fix) for name in missing]


def _take_back(submissions: Sequence[Submission], jobs: Sequence[Job]) -> None:
    """Nothing of these is queued any more, as far as the scheduler can be told."""
    for submission in submissions:
        with suppress(SchedulerError):
            slurm_queue.cancel(*slurm_queue.named(submission.name))
        discard(submission)
    for job in jobs:
        (job.folder / "launch.json").unlink(missing_ok=True)


def _job_name(sweep: str, folder: Path) -> str:
    """No other submission of this user has it: its folder is its own."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return f"sdx-{re.sub(r'[^A-Za-z0-9_.-]+', '-', sweep)[:60]}-{digest}"
