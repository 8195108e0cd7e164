"""The launching side's record of a job: `<record root>/launches/<name>/`.

A job reads its configuration from there, and who comes later finds what was started and how it
ended. The run's own record is elsewhere (sdx.record) and is believed first. Folders are 0700: a
launcher may put scripts and keys beside these files.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from sdx.config.compose import to_yaml
from sdx.config.schema import Config
from sdx.record.files import now, read_json, write_json, write_text
from sdx.record.launched import JOB
from sdx.record.status import Status
from sdx.record.store import as_path
from sdx_launchers.jobs import Ended, Job

LAUNCHES, SWEEPS, SNAPSHOTS = "launches", "sweeps", "snapshots"
CONFIG, _JOB, _LAUNCH, _OUTCOME = "config.yaml", "job.json", "launch.json", "outcome.json"


def record_root(config: Config) -> Path:
    """Where this machine keeps records of sweeps: `run.output_dir`, or `outputs` beside a store."""
    place = as_path(config.run.output_dir)
    return (place if isinstance(place, Path) else Path("outputs")).absolute()


def job_folder(config: Config, name: str) -> Path:
    """The launching side's record of the job of that name."""
    return record_root(config) / LAUNCHES / name


def write_job(job: Job, launcher: str) -> None:
    """Everything the job's process needs, and no word of how an earlier one ended."""
    job.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(job.folder / CONFIG, to_yaml(job.config))
    fields = {
        "sweep": job.sweep,
        "launcher": launcher,
        "command": job.command,
        "name": job.name,
        "run": str(job.paths.root),
        "overrides": list(job.overrides),
    }
    write_json(job.folder / _JOB, fields)
    for stale in (_LAUNCH, _OUTCOME):
        (job.folder / stale).unlink(missing_ok=True)


def job_command(
    job: Job,
    python_path: Sequence[str | PurePath],
    python: str | None = None,
    *,
    folder: str | PurePath | None = None,
) -> list[str]:
    """The argv of the job's process, to be run where the command was typed.

    `python_path` is the snapshot's; `folder` is where the job's folder lies for that process, if
    not where it lies here.
    """
    folder = PurePath(job.folder if folder is None else folder)
    return [
        "/usr/bin/env",
        "PYTHONPATH=" + ":".join(str(path) for path in python_path),
        f"{JOB}={folder / _JOB}",
        python or sys.executable,
        "-P",  # else the current folder's sdx would come before the snapshot's
        "-m",
        f"sdx.{job.command}",
        "--from",
        str(folder / CONFIG),
    ]


def write_launch(job: Job, launcher: str, id: str, **fields: Any) -> None:
    """Notes that the job was handed over; `fields` are what `Launcher.attach` needs."""
    write_json(job.folder / _LAUNCH, {"launcher": launcher, "id": id, "submitted": now(), **fields})


def remove_launch(job: Job) -> None:
    """Notes that the job was not handed over after all."""
    (job.folder / _LAUNCH).unlink(missing_ok=True)


def read_launch(folder: Path) -> dict[str, Any] | None:
    """What `write_launch` wrote; None where the job was never handed over."""
    return read_json(folder / _LAUNCH)


def read_job(folder: Path) -> dict[str, Any] | None:
    """What `write_job` wrote in job.json."""
    return read_json(folder / _JOB)


def write_outcome(job: Job, ended: Ended) -> None:
    """Notes how a job that was handed over ended, for runs that could not say so themselves."""
    if not job.folder.is_dir():
        return
    fields: Mapping[str, Any] = {"status": ended.status, "reason": ended.reason, "ended": now()}
    write_json(job.folder / _OUTCOME, fields)


def read_outcome(folder: Path) -> Ended | None:
    """What `write_outcome` wrote; None while nothing is known."""
    fields = read_json(folder / _OUTCOME)
    return None if fields is None else Ended(Status[fields["status"]], fields["reason"])
