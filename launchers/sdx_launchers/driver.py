"""Running a sweep: what is to be done, doing it, and what came of it."""

import time
from collections.abc import Sequence
from typing import Any

from sdx.config.errors import ConfigError
from sdx.config.launching import SweeperSettings
from sdx.config.sweeping import SweepRequest
from sdx.record.status import Status, read_status
from sdx_launchers.jobs import Ended, Handle, Job, Launcher
from sdx_launchers.launch_record import write_job, write_outcome
from sdx_launchers.sweep_folder import make_jobs, sweep_folder, sweep_name, write_manifest


def sweep(request: SweepRequest, settings: SweeperSettings, name: str, launcher: Launcher) -> int:
    """Runs the jobs of `request` by `launcher`, which is called `name`; returns the exit code."""
    sweep = sweep_name(request.command, request.jobs, settings.name)
    jobs = make_jobs(request.command, request.jobs, sweep)
    if problems := launcher.problems(jobs):
        raise ConfigError(problems)
    folder = sweep_folder(jobs[0].config, sweep)
    todo = [job for job in jobs if not _is_done(job)]
    for job in jobs:
        print(f"{job.name}: {'new' if job in todo else 'skipped'}")
    if settings.dry_run:
        print(launcher.describe(todo, settings.max_parallel))
        return 0
    write_manifest(folder, jobs, command=request.command, overrides=request.overrides)
    outcomes: list[Ended] = []
    with launcher:
        pending, running = list(todo), list[Handle]()
        limit = settings.max_parallel or launcher.parallel or len(jobs)
        while pending or running:
            while pending and (launcher.takes_all or len(running) < limit):
                some = pending if launcher.takes_all else pending[:1]
                pending = [] if launcher.takes_all else pending[1:]
                for job in some:
                    write_job(job, name)
                running += launcher.start(some, settings.max_parallel)
            for handle in [*running]:
                ended = handle.poll()
                if ended is not None:
                    running.remove(handle)
                    write_outcome(handle.job, ended)
                    outcomes.append(ended)
                    print(handle.job.name, ended)
            time.sleep(launcher.poll_s)
    return 0 if all(one.status is Status.finished for one in outcomes) else 1


def launch(
    request: SweepRequest, name: str, settings: Any, job_overrides: Sequence[Sequence[str]]
) -> list[Any]:
    """Jobs of a sweeper that is not sdx's."""
    raise NotImplementedError


def _is_done(job: Job) -> bool:
    status = read_status(job.paths) if job.command == "train" else None
    return status is not None and status.status is Status.finished
