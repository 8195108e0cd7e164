"""The record of a sweep: `<record root>/sweeps/<sweep>/`, a manifest of its jobs, and what is
made of them."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdx.config.errors import Problem
from sdx.config.schema import Config
from sdx.config.sweeping import SweptJob
from sdx.record.files import read_json, write_json
from sdx.record.paths import RunPaths
from sdx.record.store import as_path
from sdx_launchers.jobs import Job
from sdx_launchers.launch_record import SWEEPS, job_folder, record_root

_MANIFEST = "sweep.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,99}")


def name_problems(given: str | None) -> Iterator[Problem]:
    """A sweep's name is a folder, and a word in scripts and labels."""
    if given is not None and _NAME.fullmatch(given) is None:
        rule = "must be one word of letters, digits and _ . = + -, at most 100, not - or . first"
        yield Problem("hydra.sweeper.name", given, rule)


def sweep_name(command: str, jobs: Sequence[SweptJob], given: str | None) -> str:
    """What the sweep's folder is called: the same for the same jobs, whatever their limits."""
    if given is not None:
        return given
    config = jobs[0].config
    text = "\n".join([command, *sorted(str(job.config.run.name) for job in jobs)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{config.model.name}-{config.data.kind.name}-{digest}"


def sweep_folder(config: Config, name: str) -> Path:
    """The folder of the sweep of that name, by the configuration of one of its jobs."""
    return record_root(config) / SWEEPS / name


def make_jobs(command: str, swept: Sequence[SweptJob], sweep: str) -> list[Job]:
    """Jobs as launchers take them."""
    return [_job(command, job, sweep) for job in swept]


def write_manifest(folder: Path, jobs: Sequence[Job], **fields: object) -> None:
    """Writes sweep.json: `fields` are what holds for all jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _MANIFEST, {**fields, "jobs": [_row(job) for job in jobs]})


def add_to_manifest(folder: Path, job: Job, **fields: object) -> None:
    """Writes sweep.json with `job` after those that are there."""
    rows: Any = (read_manifest(folder) or {}).get("jobs", [])
    others = [row for row in rows if row["name"] != job.name]
    write_json(folder / _MANIFEST, {**fields, "jobs": [*others, _row(job)]})


def read_manifest(folder: Path) -> dict[str, object] | None:
    """What `write_manifest` wrote; None where the folder holds no sweep."""
    return read_json(folder / _MANIFEST)


def _row(job: Job) -> dict[str, object]:
    return {
        "name": job.name,
        "run": str(job.paths.root),
        "launch": str(job.folder),
        "overrides": list(job.overrides),
    }


def _job(command: str, swept: SweptJob, sweep: str) -> Job:
    place = as_path(swept.config.run.output_dir).absolute()
    run = replace(swept.config.run, output_dir=str(place))
    config = replace(swept.config, run=run)
    assert run.name is not None
    # an encoding is no part of the run that trains from it: each has a record of its own
    name = run.name if command == "train" else f"{command}-{run.name}"
    return Job(
        name=name,
        command=command,
        config=config,
        overrides=tuple(swept.overrides),
        paths=RunPaths(place / name),
        folder=job_folder(config, name),
        sweep=sweep,
    )
