"""Jobs for a SLURM that is not there: settings, submissions, and a scheduler of shell scripts."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from sdx.config.compose import compose
from sdx.config.launching import SlurmSettings
from sdx.config.schema import Config
from sdx.record.paths import RunPaths
from sdx_launchers.jobs import Job
from sdx_launchers.slurm.request import request_of
from sdx_launchers.slurm.script import Submission

ROOT = Path("/cluster/home/ann/outputs")
PYTHON = "/opt/python/bin/python3.11"


@cache
def slurm_config(preset: str = "cpu", **hardware: Any) -> Config:
    """The tiny model on that hardware, with other counts where they are given."""
    config = compose([f"hardware={preset}"])
    return replace(config, hardware=replace(config.hardware, **hardware))


def make_settings(**more: Any) -> SlurmSettings:
    return SlurmSettings(**{"python": PYTHON, **more})


def make_job(name: str = "a", root: Path = ROOT, config: Config | None = None) -> Job:
    config = config or slurm_config()
    run = replace(config.run, output_dir=str(root), name=name)
    return Job(
        name=name,
        command="train",
        config=replace(config, run=run),
        overrides=(),
        paths=RunPaths(root / name),
        folder=root / "launches" / name,
        sweep="a-sweep",
    )


def make_submission(
    jobs: Sequence[Job], settings: SlurmSettings, max_parallel: int | None = None, root: Path = ROOT
) -> Submission:
    code = PurePath(root / "snapshots" / "0123456789abcdef")
    return Submission(
        "sdx-a-sweep-01234567",
        root / "sweeps" / "a-sweep" / "slurm" / "1",
        jobs,
        request_of(settings, jobs[0].config.hardware),
        max_parallel,
        (code, code / "launchers"),
    )


def put_on_path(folder: Path, **programs: str) -> str:
    """A PATH where these shell scripts come first."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
