"""What a sweep and the launchers say to each other: a job, and how it goes.

The sweep decides what runs, in what order, and what counts as done; a launcher knows how to start
one thing somewhere and what became of it. The truth about a run is its own status.json; what a
launcher says is believed where the run says nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sdx.config.errors import Problem
from sdx.config.schema import Config
from sdx.record.paths import RunPaths
from sdx.record.status import Status
from sdx.record.store import AnyPath


@dataclass(frozen=True)
class Job:
    """One run, or one encoding, to be done somewhere.

    `name` is unique in its sweep and the name of the run's folder; `overrides` are what was typed
    for it, without keys of Hydra. `config` names an absolute `run.output_dir` where that is a
    local folder. `folder` is the launching side's own record of it (see launch_record.py).
    """

    name: str
    command: str  # train or encode
    config: Config
    overrides: tuple[str, ...]
    paths: RunPaths[AnyPath]
    folder: Path
    sweep: str


@dataclass(frozen=True)
class Ended:
    """How a job ended, as its launcher sees it: `finished`, `failed`, `interrupted`, `cancelled`.

    `reason` names the rank, the signal, the scheduler's state; None where all went well.
    """

    status: Status
    reason: str | None = None


class Handle(Protocol):
    """A job that was started, by this process or one before it."""

    @property
    def job(self) -> Job: ...

    @property
    def id(self) -> str:
        """As the scheduler, or a person with `kill`, knows it."""
        ...

    def poll(self) -> Ended | None:
        """How it ended; None while it runs or waits. Cheap: it is asked every `poll_s`."""
        ...

    def stop(self) -> None:
        """Asks it to save and end; returns at once. Asked again, ends it."""
        ...


class Launcher(Protocol):
    """A place for jobs. Entered once around all of them."""

    @property
    def parallel(self) -> int | None:
        """Jobs at a time where nobody says otherwise; None: as many as there are."""
        ...

    @property
    def takes_all(self) -> bool:
        """Whether it is handed all jobs at once and keeps to `max_parallel` itself."""
        ...

    @property
    def poll_s(self) -> float: ...

    @property
    def outlives_driver(self) -> bool:
        """Whether its jobs go on when the sweep's process ends."""
        ...

    @property
    def detach(self) -> bool:
        """Whether the sweep returns as soon as all jobs are submitted."""
        ...

    def problems(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        """Everything that keeps these jobs from being started there together, found without
        touching anything."""
        ...

    def describe(self, jobs: Sequence[Job], max_parallel: int | None) -> str:
        """All that `start` would do, to the letter: scripts, requests, commands."""
        ...

    def start(self, jobs: Sequence[Job], max_parallel: int | None) -> Sequence[Handle]:
        """Starts `jobs`, in order; LaunchError when it cannot, SnapshotError when the code cannot
        be copied, with nothing left behind."""
        ...

    def attach(self, job: Job, launch: Mapping[str, Any]) -> Handle | None:
        """The job that a process before this one started, from what that wrote down; None where
        there is no such job any more."""
        ...

    def __enter__(self) -> "Launcher": ...

    def __exit__(self, *error: object) -> None:
        """Leaves nothing behind that costs: local children end, TPUs are deleted."""
        ...


class LaunchError(RuntimeError):
    """A job could not be started; the text says where, why, and what to do."""
