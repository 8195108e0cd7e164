"""The acts of a start in order, and the record kept while a run goes on and when it ends.

A start that is refused leaves the folder as it was. What a changed key means is decided by whoever
knows the configuration and handed in as `Change`s.
"""

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from sdx.record.behind import flush
from sdx.record.files import now, read_json, write_json, write_text
from sdx.record.launched import launched_job, scheduler_ids
from sdx.record.lock import RefusedStart, RunLock
from sdx.record.paths import RunPaths
from sdx.record.provenance import provenance, uncommitted_changes
from sdx.record.status import RunStatus, Status, read_status, write_status
from sdx.record.stop_request import StopRequest, forget_stop, read_stop
from sdx.record.store import AnyPath, StoreError


class Admission(Enum):
    """What a start would do: begin a run, go on with one, or nothing because it is done."""

    fresh = "fresh"
    resume = "resume"
    finished = "finished"


class AlreadyFinished(Exception):
    """The run is done; not a fault (exit code 0)."""


@dataclass(frozen=True)
class Change:
    """A key that differs from the saved configuration; `on_resume`: forbidden, warn or free."""

    path: str
    old: Any
    new: Any
    on_resume: str


class RunRecord:
    """One start of a run, holding the folder's lock: what is written about it until it ends.

    `attempt` counts starts from 1; `resumes` is false for the first. `lock.lost` says that another
    process took the folder.
    """

    def __init__(self, paths: RunPaths, lock: RunLock, attempt: int, previous: RunStatus | None):
        self.paths = paths
        self.lock = lock
        self.attempt = attempt
        self.resumes = attempt > 1
        self.step = 0 if previous is None else previous.step
        self._ended = False
        self._ending = threading.Lock()

    @property
    def lost(self) -> bool:
        """Whether the folder is another process's by now."""
        return self.lock.lost

    def update(self, **fields: Any) -> None:
        """Sets top-level fields of run.json."""
        write_json(self.paths.run, {**(read_json(self.paths.run) or {}), **fields})

    def begin(self, first_step: int, cut_rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Notes the step this attempt goes on from and the rows cut off metrics.jsonl for it."""
        self.step = first_step
        self._note(first_step=first_step, cut_rows=list(cut_rows))
        write_status(self.paths, Status.running, step=first_step)

    def progress(self, step: int) -> None:
        """Notes in status.json that `step` is done; for the cadence of metrics, not each step."""
        self.step = step
        write_status(self.paths, Status.running, step=step, later=True)

    def finish(self, status: Status, *, step: int | None = None, reason: str | None = None) -> None:
        """Writes how this attempt ended and frees the lock; only the first call of any thread.

        An interrupted run that was asked to stop ends as was asked.
        """
        with self._ending:
            if self._ended:
                return
            self._ended = True
            step = self.step if step is None else step
            asked = self.asked() if status is Status.interrupted else None
            if asked is not None:
                status, reason = asked.status, asked.reason
            if not self.lock.lost:  # then the folder is another process's to write
                flush()
                self._note(ended=now(), last_step=step, outcome=status, reason=reason)
                write_status(self.paths, status, step=step, reason=reason)
            self.lock.release()

    def asked(self) -> StopRequest | None:
        """What somebody asked of the run since this start."""
        return read_stop(self.paths)

    def _note(self, **fields: Any) -> None:
        path = _attempt_path(self.paths, self.attempt)
        write_json(path, {**(read_json(path) or {}), **fields})


class FollowedRecord:
    """The start as it is for the other JAX processes of a run: the first one has the RunRecord and
    writes, these make the same calls and write nothing."""

    lost = False

    def __init__(self, paths: RunPaths, attempt: int, step: int):
        self.paths = paths
        self.attempt = attempt
        self.step = step

    def update(self, **fields: Any) -> None:
        """As RunRecord's."""

    def begin(self, first_step: int, cut_rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """As RunRecord's."""
        self.step = first_step

    def progress(self, step: int) -> None:
        """As RunRecord's."""
        self.step = step

    def finish(self, status: Status, *, step: int | None = None, reason: str | None = None) -> None:
        """As RunRecord's."""

    def asked(self) -> StopRequest | None:
        """Nothing: the first process hears and tells."""
        return None


AnyRecord = RunRecord | FollowedRecord


def admit(paths: RunPaths, *, resume: str, max_steps: int) -> Admission:
    """What a start would do now; writes nothing. RefusedStart when `run.resume` is not met."""
    exists = _exists(paths)
    if resume == "never" and exists:
        raise RefusedStart(
            f"run.resume=never: {paths.root} exists already; "
            "use run.resume=auto to continue it, or another run.name."
        )
    if resume == "must" and not (exists and _has_checkpoint_folder(paths)):
        raise RefusedStart(
            f"run.resume=must: {paths.root} holds no run with a checkpoint to continue; "
            "check run.name and run.output_dir, or use run.resume=auto to start it."
        )
    status = read_status(paths)
    if status is not None and status.status is Status.finished and status.step >= max_steps:
        return Admission.finished
    return Admission.resume if exists else Admission.fresh


def start(
    paths: RunPaths,
    *,
    config_yaml: str,
    config: Mapping[str, Any],
    overrides: Sequence[str],
    resume: str,
    max_steps: int,
    devices: Sequence[str] = (),
    changes: Sequence[Change] = (),
    parent: str | None = None,
) -> RunRecord:
    """Takes the run folder, making it if need be, and records this start.

    The caller owes the record a `finish`.

    In order: `run.resume` and forbidden changes are checked, a finished run is recognised, the lock
    is taken, all of that is checked again under it, then config.yaml, run.json, attempts/<n>.json
    and status.json are written.

    Args:
        config: the resolved configuration as plain values, for run.json (enums allowed).
        resume: auto, never or must.
        parent: RUN@STEP this run was forked from.

    Raises:
        StoreError: an object store that cannot be used; exit code 2.
        RefusedStart: `run.resume` not met, a forbidden change, a folder that cannot be written, or
            (RunLocked) another living process; exit code 2.
        AlreadyFinished: nothing to do; its text says so; exit code 0.
    """
    _check(paths, resume, max_steps, changes)
    lock = RunLock(paths.lock)
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except StoreError:  # says what to do about it
        raise
    except OSError as error:
        raise RefusedStart(
            f"{paths.root}: cannot be written ({error.strerror}); use another run.output_dir."
        ) from error
    try:
        # again: another process may have started or finished the run before we had the lock
        _check(paths, resume, max_steps, changes)
        record = RunRecord(paths, lock, _last_attempt(paths) + 1, read_status(paths))
        _write_start(record, config_yaml, config, overrides, devices, changes, parent)
    except BaseException:
        lock.release()
        raise
    return record


def _check(paths: RunPaths, resume: str, max_steps: int, changes: Sequence[Change]) -> None:
    admission = admit(paths, resume=resume, max_steps=max_steps)
    forbidden = [change for change in changes if change.on_resume == "forbidden"]
    if forbidden and admission is not Admission.fresh:
        lines = [
            f"  {change.path}: {change.old!r} there, {change.new!r} here" for change in forbidden
        ]
        raise RefusedStart(
            "\n".join([f"{paths.root}: holds a run with other mathematics:", *lines])
            + "\nPut the values back, use another run.name, or fork it with run.resume_from."
        )
    if admission is Admission.finished:
        status = read_status(paths)
        steps = max_steps if status is None else status.step
        raise AlreadyFinished(
            f"{paths.root} is finished ({steps} steps); a larger train.max_steps continues it."
        )


def _write_start(
    record: RunRecord,
    config_yaml: str,
    config: Mapping[str, Any],
    overrides: Sequence[str],
    devices: Sequence[str],
    changes: Sequence[Change],
    parent: str | None,
) -> None:
    paths, attempt = record.paths, record.attempt
    paths.attempts.mkdir(exist_ok=True)
    forget_stop(paths)
    _close_attempt(paths, attempt - 1)
    patch = uncommitted_changes()
    if patch is not None:
        write_text(paths.patch(attempt), patch)
    write_text(paths.config, config_yaml)
    known = read_json(paths.run) or {"created": now(), "parent": parent}
    program = provenance()
    program["git_patch"] = None if patch is None else f"attempts/{paths.patch(attempt).name}"
    job = launched_job()
    this_start = {
        "overrides": list(overrides),
        "sweep": job and job.sweep,
        "launcher": job and job.launcher,
        "devices": list(devices),
        "attempts": attempt,
    }
    write_json(paths.run, {**known, **this_start, **program, "config": config})
    attempt_fields = {
        "attempt": attempt,
        "started": now(),
        "ended": None,
        "outcome": None,
        "first_step": None,
        "last_step": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "scheduler": scheduler_ids(),
        "git_commit": program["git_commit"],
        "overrides": list(overrides),
        "devices": list(devices),
        "changes": [asdict(change) for change in changes],
        "cut_rows": [],
    }
    write_json(_attempt_path(paths, attempt), attempt_fields)
    write_status(paths, Status.running, step=record.step)


def _close_attempt(paths: RunPaths, attempt: int) -> None:
    """Fills in the end of an attempt that was killed before it could."""
    path = _attempt_path(paths, attempt)
    fields = read_json(path)
    status = read_status(paths)
    if fields is not None and fields["outcome"] is None and status is not None:
        ended = {"ended": status.updated, "last_step": status.step, "outcome": Status.interrupted}
        write_json(path, {**fields, **ended})


def _exists(paths: RunPaths) -> bool:
    """Whether anything lies there but a lock, a stale request, or the announcement of a job not
    started yet."""
    if not paths.root.exists():
        return False
    if not paths.root.is_dir():
        raise RefusedStart(f"{paths.root}: is a file, not a run folder; use another run.name.")
    status = read_status(paths)
    if status is not None and status.status is Status.queued and _last_attempt(paths) == 0:
        return False
    return not all(
        _is_lock(paths, entry.name) or entry.name == paths.stop.name
        for entry in paths.root.iterdir()
    )


def _is_lock(paths: RunPaths, name: str) -> bool:
    """A folder in an object store, a file and its guard elsewhere."""
    return name == paths.lock.stem or name.lstrip(".").startswith(paths.lock.name)


def _has_checkpoint_folder(paths: RunPaths) -> bool:
    return paths.checkpoints.is_dir() and any(
        entry.name.isdigit() for entry in paths.checkpoints.iterdir()
    )


def _last_attempt(paths: RunPaths) -> int:
    return max((int(path.stem) for path in paths.attempts.glob("*.json")), default=0)


def _attempt_path(paths: RunPaths, attempt: int) -> AnyPath:
    return paths.attempts / f"{attempt}.json"
