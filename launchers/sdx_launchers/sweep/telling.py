"""What a sweep says while it goes on, a line for each job that starts or ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdx.record.metrics import read_column
from sdx.record.status import Status
from sdx.record.store import StoreError
from sdx_launchers.jobs import Ended, Handle, Job
from sdx_launchers.launch_record import read_job
from sdx_launchers.runs.table import duration
from sdx_launchers.saying import say
from sdx_launchers.sweep.course import Told
from sdx_launchers.sweep.objective import Objective, Value
from sdx_launchers.sweep.plan import shown_path
from sdx_launchers.sweep.standing import ELSEWHERE


class Progress(Told):
    """Lines that begin with the job's number among all; `labels` are what differs, by name."""

    def __init__(self, labels: Mapping[str, str], objective: Objective, *, submits: bool):
        self._labels = labels
        self._numbers = {name: number for number, name in enumerate(labels, start=1)}
        self._objective = objective
        self._times_stopped = 0
        self._submits = submits  # its launcher says the ids itself, when they are known

    def started(self, handle: Handle) -> None:
        if not self._submits:
            label = self._labels[handle.job.name]
            self._say(handle.job, f"started, process {handle.id}{label and ': '}{label}")

    def ended(self, job: Job, ended: Ended, seconds: float) -> None:
        parts = [f"{ended.status.name} after {duration(seconds)}"]
        best = best_value(job, self._objective) if ended.status is Status.finished else None
        parts += [f"{self._objective.metric} {best.value:.4g} at step {best.step}"] if best else []
        parts += [ended.reason] if ended.reason else []
        self._say(job, ", ".join(parts))

    def elsewhere(self, handle: Handle) -> None:
        noted = read_job(handle.job.folder)
        by = "" if noted is None else f" by the sweep {noted['sweep']}"
        job = "" if handle.id == ELSEWHERE else f", job {handle.id}"
        self._say(handle.job, f"was started elsewhere{by}{job}: waits for it")

    def settled(self, job: Job, ended: Ended) -> None:
        self._say(
            job, f"{ended.status.name} meanwhile{f', {ended.reason}' if ended.reason else ''}"
        )

    def left(self, job: Job) -> None:
        self._say(job, "was stopped where it ran: this sweep goes on with it")

    def refused(self, jobs: Sequence[Job], reason: str) -> None:
        count = "1 job was" if len(jobs) == 1 else f"{len(jobs)} jobs were"
        say(f"sdx: {count} not started: {reason}")

    def leaving(self, handle: Handle) -> None:
        self._say(handle.job, "goes on elsewhere, without this sweep")

    def stopping(self, handles: Sequence[Handle]) -> None:
        self._times_stopped += 1
        if not handles:
            return
        is_one = len(handles) == 1
        jobs, them = ("1 job", "it") if is_one else (f"{len(handles)} jobs", "them")
        if self._times_stopped > 1:
            say(f"{jobs} {'is' if is_one else 'are'} ended at once")
            return
        save = "saves and ends" if is_one else "save and end"
        say(f"{jobs} {save}; Ctrl-C again ends {them} at once")

    def _say(self, job: Job, text: str) -> None:
        number = self._numbers[job.name]
        say(f"[{number}/{len(self._numbers)}] {job.name} {text}")


def best_value(job: Job, objective: Objective) -> Value | None:
    """What the job's run is judged by so far; None where there is nothing, or nothing readable."""
    if job.command != "train":
        return None
    try:
        return objective.best(read_column(job.paths.metrics, objective.metric))
    except (StoreError, ValueError, OSError):
        return None


def going_on(folder: Path, count: int) -> str:
    """What a sweep says that leaves before its jobs do."""
    jobs = "1 job goes" if count == 1 else f"{count} jobs go"
    control = f"python -m sdx.runs {shown_path(folder)}"
    return "\n".join(
        [
            f"{jobs} on without this process.",
            f"  look    {control}",
            f"  follow  {control} --follow",
            f"  cancel  {control} --cancel",
            "The same command waits for them again, and resumes what was cut off.",
        ]
    )
