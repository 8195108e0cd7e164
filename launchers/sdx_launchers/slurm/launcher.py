"""Jobs of a SLURM cluster: handed in through submitit, followed through squeue and their files.

Jobs that ask for the same are one array, which keeps to `max_parallel` itself. All are handed in
held, written down with their ids, and only then released: a launcher that is killed on the way
leaves nothing that runs and nobody knows of. What a job does about time limits, preemptions and
crashes is in its script (slurm/script.py, slurm/after.py), so it goes on without a launcher.
"""

import hashlib
import re
import shutil
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
from sdx_launchers.jobs import Ended, Job, LaunchError
from sdx_launchers.launch_record import (
    SNAPSHOTS,
    SWEEPS,
    record_root,
    remove_launch,
    write_launch,
)
from sdx_launchers.saying import say
from sdx_launchers.slurm import queue as slurm_queue
from sdx_launchers.slurm.after import COUNTS, ENDED, STOPPED
from sdx_launchers.slurm.queue import JobState, Queue, SchedulerError
from sdx_launchers.slurm.request import (
    Request,
    job_problems,
    pace_problems,
    request_of,
    settings_problems,
)
from sdx_launchers.slurm.script import Submission, check_possible, discard, render, submit

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
_COMES_WITHIN_S = 60.0  # a job just handed in, and its files, on a busy cluster


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

    def problems(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        """Values and hardware that cannot be, and a partition that this cluster does not have."""
        found = [*settings_problems(self._settings), *job_problems(self._settings, jobs)]
        found += pace_problems(self._settings, jobs, max_parallel)
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
        if shutil.which("sbatch") is None:
            raise LaunchError(
                f"hydra/launcher={NAME}: there is no sbatch on this machine; type the command on a "
                "login node of the cluster, or hydra.sweeper.dry_run=true to see its scripts."
            )
        snapshot = take_snapshot(record_root(jobs[0].config) / SNAPSHOTS)
        submissions = self._submissions(jobs, max_parallel, snapshot.python_path)
        handles: dict[str, SlurmHandle] = {}
        try:
            for submission in submissions:
                check_possible(submission, self._settings)
            for submission in submissions:
                handles |= self._hand_in(submission)
            for submission in submissions:
                self._release([handles[job.name] for job in submission.jobs])
        except BaseException as error:
            left = _take_back(submissions)
            if isinstance(error, SchedulerError | LaunchError):
                raise LaunchError(f"hydra/launcher={NAME}: {error}; {left}.") from error
            raise
        self._queue.refresh()
        return [handles[job.name] for job in jobs]

    def attach(self, job: Job, launch: Mapping[str, Any]) -> "SlurmHandle | None":
        """A job that was released, however it goes; one whose launcher died before it was written
        down is taken back."""
        if not launch["id"]:
            with suppress(SchedulerError):
                slurm_queue.cancel(*slurm_queue.named(launch["name"]))
            return None
        handle = SlurmHandle(job, launch, self._queue, self._settings.signal_delay_s)
        if not launch["released"] and handle.poll() is None:
            with suppress(SchedulerError):  # the next one who looks does it
                self._release([handle])
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
        folder = record_root(jobs[0].config) / SWEEPS / jobs[0].sweep / _SUBMISSIONS
        number = 1 + max((int(old.name) for old in folder.glob("[1-9]*")), default=0)
        submissions = []
        for request, group in by_request.items():
            own = folder / str(number)
            name = _job_name(jobs[0].sweep, own)
            submissions.append(Submission(name, own, group, request, max_parallel, python_path))
            number += 1
        return submissions

    def _hand_in(self, submission: Submission) -> dict[str, "SlurmHandle"]:
        for job in submission.jobs:
            for stale in (STOPPED, COUNTS, ENDED):
                (job.folder / stale).unlink(missing_ok=True)
            write_launch(job, NAME, "", name=submission.name, released=False)
        handles = {}
        for job, id in zip(submission.jobs, submit(submission, self._settings), strict=True):
            logs = [str(path) for path in submission.logs(id)]
            launch = {"name": submission.name, "logs": logs, "released": False}
            write_launch(job, NAME, id, **launch)
            say(f"sdx: SLURM job {id}: {job.name}, log {logs[0]}")
            handles[job.name] = SlurmHandle(
                job, launch | {"id": id}, self._queue, self._settings.signal_delay_s, is_new=True
            )
        return handles

    def _release(self, handles: Sequence["SlurmHandle"]) -> None:
        """Lets jobs of one submission start; notes that nothing holds them any more."""
        ids = [handle.id for handle in handles]
        slurm_queue.release(ids[0] if len(ids) == 1 else ids[0].partition("_")[0])
        for handle in handles:
            name, logs = handle.launch["name"], handle.launch["logs"]
            write_launch(handle.job, NAME, handle.id, name=name, logs=logs, released=True)


class SlurmHandle:
    """A job that was handed in; by this process (`is_new`), or one before it."""

    def __init__(
        self,
        job: Job,
        launch: Mapping[str, Any],
        queue: Queue,
        grace_s: float,
        *,
        is_new: bool = False,
    ):
        self.job = job
        self.id: str = launch["id"]
        self.launch = launch
        self._queue = queue
        self._grace_s = grace_s
        self._is_new = is_new
        self._stopped_at: float | None = None
        self._is_ended = False
        self._unknown_since: float | None = None
        self._was_held = False

    def poll(self) -> Ended | None:
        state = self._queue.state(self.id)
        if self._has_had_its_grace():
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
        """Keeps it from going on, and takes it out of the queue where it has not begun."""
        (self.job.folder / STOPPED).touch()
        state = self._queue.state(self.id)
        has_begun = state is not None and not state.is_waiting
        if self._stopped_at is not None or not has_begun:
            self._cancel()
        elif self.job.command != "train" or read_status(self.job.paths) is None:
            self._signal()
        elif read_stop(self.job.paths) is None:
            request_stop(self.job.paths, Status.interrupted, "stopped by its sweep")
        self._stopped_at = self._stopped_at or time.monotonic()

    def _cancel(self) -> None:
        self._is_ended = True
        with suppress(SchedulerError):  # it ended meanwhile
            slurm_queue.cancel(self.id)

    def _signal(self) -> None:
        with suppress(SchedulerError):
            slurm_queue.cancel("--signal=TERM", self.id)

    def _has_had_its_grace(self) -> bool:
        if self._stopped_at is None or self._is_ended:
            return False
        return time.monotonic() - self._stopped_at > self._grace_s

    def _say_held(self, state: JobState | None) -> None:
        is_held = state is not None and state.is_held
        if state is not None and is_held and not self._was_held:
            text = f"sdx: SLURM holds job {self.id} ({state.reason}); scontrol release {self.id}"
            say(text, aside=True)
        self._was_held = is_held

    def _ended(self, state: JobState) -> Ended:
        """What the scheduler says, with the words of the job's script where those are there."""
        status = _BY_STATE.get(state.state, Status.failed)
        if status is Status.finished:
            return Ended(status)
        noted, was_stopped = self._noted(), (self.job.folder / STOPPED).exists()
        if was_stopped and (status is Status.cancelled or noted is None):
            is_ours = self._stopped_at is not None
            return Ended(Status.interrupted if is_ours else Status.cancelled, "stopped")
        if status is Status.failed and noted is not None:
            return Ended(_BY_CODE.get(noted["code"], Status.failed), noted["reason"])
        log = Path(self.launch["logs"][0])
        return Ended(status, f"SLURM says {state.state}" + (f", see {log}" if log.exists() else ""))

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
        if self._is_new and now - self._unknown_since < _COMES_WITHIN_S:
            return None
        if status is None:
            return Ended(Status.interrupted, f"SLURM knows no job {self.id} any more")
        return Ended(status.status, status.reason)

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


def _take_back(submissions: Sequence[Submission]) -> str:
    """Takes these out of the queue; what is left there, in words."""
    names = [submission.name for submission in submissions]
    try:
        for name in names:
            slurm_queue.cancel(*slurm_queue.named(name))
    except SchedulerError:
        return f"what is queued as {', '.join(names)} is held and never starts"
    for submission in submissions:
        discard(submission)
        for job in submission.jobs:
            remove_launch(job)
    return "nothing is queued"


def _job_name(sweep: str, folder: Path) -> str:
    """No other submission of this user has it: its folder is its own."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    return f"sdx-{re.sub(r'[^A-Za-z0-9_.-]+', '-', sweep)[:60]}-{digest}"
