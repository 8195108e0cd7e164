"""How a job stands: what its run, its launcher and the process that started it say, made one.

The run is believed first. A launcher is believed where the run says nothing: it was never begun,
was ended before it could tell, or is an encoding, which keeps no status.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from sdx.record.files import read_json
from sdx.record.status import RunStatus, Status, read_status
from sdx.record.store import StoreError
from sdx_launchers.jobs import Ended, Handle, Job
from sdx_launchers.launch_record import read_launch, read_outcome, write_outcome

Attach = Callable[[Job, Mapping[str, Any]], Handle | None]
ELSEWHERE = "elsewhere"
"""The id of a job that some other process than a sweep's launcher runs."""
_READS_AT_ONCE = 16
_REPEATED = (Status.failed, Status.cancelled)  # started again only where that is asked for


@dataclass(frozen=True)
class Standing:
    """`status` is None for a job that was never started; `before` is what its run said by then.

    A job with a `handle` goes on somewhere and is waited for.
    """

    job: Job
    status: Status | None
    step: int = 0
    reason: str | None = None
    handle: Handle | None = None
    before: RunStatus | None = None

    def is_to_start(self, retry_failed: bool) -> bool:
        """Whether the sweep starts it, anew or from its checkpoint."""
        if self.handle is not None or self.status is Status.pruned:
            return False
        if self.status in _REPEATED:
            return retry_failed
        return self.status is not Status.finished


def look(jobs: Sequence[Job], attach: Attach) -> list[Standing]:
    """Where each job stands. A job that its scheduler still knows comes with a handle; one that
    ended while nobody looked is noted as ended."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        runs = list(pool.map(_run_status, jobs))
    return [_standing(job, run, attach) for job, run in zip(jobs, runs, strict=True)]


def settle(job: Job, ended: Ended, before: RunStatus | None) -> Ended:
    """How a job ended that its launcher says has `ended`; `before` is what its run said when it was
    started."""
    try:
        run = _run_status(job)
    except StoreError:
        return ended
    if job.command != "train":
        return ended
    if run is None or run == before or run.status is Status.running or _was_cut_off(job):
        return _unproven(job, run, ended)
    if run.status is Status.finished and not _is_done(job, run):
        return _unproven(job, run, ended)
    told = ended.reason if ended.status is run.status else None  # such as a limit of requeues
    return Ended(run.status, run.reason or told)


def _standing(job: Job, run: RunStatus | None, attach: Attach) -> Standing:
    handle = _handle(job, attach)
    step, reason = (0, None) if run is None else (run.step, run.reason)
    if handle is not None and (ended := handle.poll()) is not None:
        write_outcome(job, settle(job, ended, None))
        handle = None
        run = _run_status(job)
    if handle is not None:
        is_running = run is not None and run.status is Status.running
        return Standing(job, Status.running if is_running else Status.queued, step, None, handle)
    if run is None:
        outcome = read_outcome(job.folder) if job.command == "train" else None
        if outcome is None or outcome.status not in _REPEATED:  # its run was removed since
            return Standing(job, None)
        return Standing(job, outcome.status, 0, outcome.reason)
    standing = Standing(job, run.status, run.step, reason, before=run)
    if run.status is Status.running:
        return replace(standing, handle=_Elsewhere(job))
    if run.status is Status.queued:
        return replace(standing, status=None)
    if run.status is Status.finished and not _is_done(job, run):
        return replace(standing, status=Status.interrupted, reason="asked for more steps")
    return standing


def _handle(job: Job, attach: Attach) -> Handle | None:
    launch = read_launch(job.folder)
    if launch is None or read_outcome(job.folder) is not None:
        return None
    return attach(job, launch)


def _run_status(job: Job) -> RunStatus | None:
    return read_status(job.paths) if job.command == "train" else None


def _was_cut_off(job: Job) -> bool:
    """Whether the run still says that it runs, and does not."""
    return (read_json(job.paths.status) or {}).get("status") == Status.running.name


def _unproven(job: Job, run: RunStatus | None, ended: Ended) -> Ended:
    """The launcher's word, but that a run is finished is the run's own to say."""
    if ended.status is not Status.finished or (run is not None and _is_done(job, run)):
        return ended
    if run is None:
        return Ended(Status.failed, "ended without a record of its run")
    return Ended(Status.interrupted, f"stopped at step {run.step}")


def _is_done(job: Job, run: RunStatus) -> bool:
    """Whether the run has done all that its configuration asks for."""
    train, export = job.config.train, job.config.export
    if run.status is not Status.finished or (export.at_end and not job.paths.export.exists()):
        return False
    if train.max_steps is not None:
        return run.step >= train.max_steps
    saved = (read_json(job.paths.run) or {}).get("config", {})
    return saved.get("train.max_steps") is None and saved.get("train.epochs") == train.epochs


class _Elsewhere:
    """A run that something else than a sweep's launcher has started: its record tells how it goes,
    and it is not ours to stop."""

    id = ELSEWHERE

    def __init__(self, job: Job):
        self.job = job
        self._is_left = False

    def poll(self) -> Ended | None:
        if self._is_left:
            return Ended(Status.interrupted, "it goes on elsewhere")
        run = read_status(self.job.paths)
        if run is not None and run.status is Status.running:
            return None
        return Ended(Status.interrupted) if run is None else Ended(run.status, run.reason)

    def stop(self) -> None:
        self._is_left = True
