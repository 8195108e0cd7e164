"""A sweep from its first check to its summary, by any launcher.

All that keeps it from running is found before anything is touched; then its folder is locked, so
that two of the same do not start a job twice, the plan is shown, and the jobs are run. Killed at
any point, the same command finds in the records what there is still to do.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sdx.config.errors import ConfigError, Problem
from sdx.config.launching import LauncherSettings, SweeperSettings
from sdx.config.sweeping import SweepRequest, is_of_hydra
from sdx.record.files import DamagedRecord
from sdx.record.lock import RefusedStart
from sdx.record.snapshot import SnapshotError
from sdx.record.status import Status
from sdx.record.store import StoreError
from sdx_launchers.jobs import Handle, Job, Launcher
from sdx_launchers.places import attach_by, make_launcher
from sdx_launchers.runs import summary
from sdx_launchers.runs.table import print_table
from sdx_launchers.saying import say
from sdx_launchers.sweep import course
from sdx_launchers.sweep.course import Course
from sdx_launchers.sweep.folder import (
    make_jobs,
    name_problems,
    sweep_folder,
    sweep_name,
    write_manifest,
)
from sdx_launchers.sweep.objective import Objective, parse_objective
from sdx_launchers.sweep.plan import differing, label, show_plan, shown_path
from sdx_launchers.sweep.process import SweepProcess
from sdx_launchers.sweep.standing import Standing, look
from sdx_launchers.sweep.stop_signals import StopSignals
from sdx_launchers.sweep.telling import Progress, best_value, going_on
from sdx_launchers.sweep.turn import turn

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
_BY_WEIGHT = (FAILED, REFUSED, INTERRUPTED, FINISHED)


@dataclass(frozen=True)
class Prepared:
    """A sweep without faults, of which nothing is written yet."""

    folder: Path
    jobs: Sequence[Job]
    objective: Objective
    launcher: Launcher
    launcher_name: str


def sweep(request: SweepRequest, settings: SweeperSettings, name: str, launcher: Launcher) -> int:
    """Runs the jobs of `request` by `launcher`, which is called `name`; returns the exit code.
    Raises ConfigError where something keeps a job from being started there."""
    prepared = prepare(request, settings, name, launcher)
    try:
        if settings.dry_run:
            return _dry_run(prepared, settings)
        with SweepProcess(prepared.folder) as process:
            return _run(prepared, request, settings, process)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (RefusedStart, StoreError, DamagedRecord, SnapshotError) as error:
        say(f"sdx: {error}", aside=True)
        return REFUSED


def prepare(
    request: SweepRequest, settings: SweeperSettings, name: str, launcher: Launcher
) -> Prepared:
    """The jobs as launchers take them; raises ConfigError with all that keeps them from running."""
    objective = parse_objective(settings.objective)
    problems = [*name_problems(settings.name)]
    problems += [objective] if isinstance(objective, Problem) else []
    sweep = sweep_name(request.command, request.jobs, settings.name)
    jobs = make_jobs(request.command, request.jobs, sweep)
    problems += _path_problems(jobs[0])
    if settings.fail_fast and launcher.detach:
        rule = "must be false with hydra.launcher.detach=true: nobody stays to stop the others"
        problems.append(Problem("hydra.sweeper.fail_fast", "true", rule, "drop one of the two"))
    problems += launcher.problems(jobs, settings.max_parallel)
    if problems or isinstance(objective, Problem):
        raise ConfigError(problems)
    return Prepared(sweep_folder(jobs[0].config, sweep), jobs, objective, launcher, name)


def _path_problems(job: Job) -> list[Problem]:
    """Of the folder that holds the code of all jobs."""
    folder = str(job.folder.parent.parent)
    if os.pathsep not in folder:
        return []
    rule = f"the code of jobs lies below it, and PYTHONPATH takes no {os.pathsep} in a folder"
    return [Problem("run.output_dir", repr(folder), rule, "use another folder")]


def manifest(prepared: Prepared, request: SweepRequest) -> None:
    """Writes what the sweep is, for sdx.runs and the summary."""
    write_manifest(
        prepared.folder,
        prepared.jobs,
        command=request.command,
        overrides=request.overrides,
        launcher=prepared.launcher_name,
        objective=str(prepared.objective),
    )


def exit_code(statuses: Sequence[Status | None]) -> int:
    """1 if a job failed, else 75 if one is not done, else 0."""
    if Status.failed in statuses:
        return FAILED
    return FINISHED if {*statuses} <= {Status.finished, Status.pruned} else INTERRUPTED


def launch(
    request: SweepRequest,
    name: str,
    settings: LauncherSettings,
    job_overrides: Sequence[Sequence[str]],
) -> list[float | None]:
    """Runs jobs for a sweeper that is not sdx's; returns what they are judged by, None of those
    that have no value. The exit code, of all such calls, goes into `request`."""
    own = [[text for text in texts if not is_of_hydra(text)] for texts in job_overrides]
    request.jobs = request.compose(own)
    code = sweep(request, SweeperSettings(), name, make_launcher(name, settings))
    request.exit_code = min(request.exit_code, code, key=_BY_WEIGHT.index)
    objective = Objective("validation_loss")
    found = [best_value(job, objective) for job in make_jobs(request.command, request.jobs, "")]
    return [None if value is None else value.value for value in found]


def _dry_run(prepared: Prepared, settings: SweeperSettings) -> int:
    standings = _survey(prepared, is_dry=True)
    _show(prepared, settings, standings)
    jobs = [one.job for one in standings if one.is_to_start(settings.retry_failed)]
    say(prepared.launcher.describe(jobs, settings.max_parallel))
    say("dry run: nothing was started.")
    return FINISHED


def _run(
    prepared: Prepared, request: SweepRequest, settings: SweeperSettings, process: SweepProcess
) -> int:
    launcher, folder = prepared.launcher, prepared.folder
    with turn(prepared.jobs[0].folder.parent):
        standings = _survey(prepared, is_dry=False)
    _show(prepared, settings, standings)
    manifest(prepared, request)
    todo = [one for one in standings if one.handle or one.is_to_start(settings.retry_failed)]
    told = Progress(_labels(prepared.jobs), prepared.objective, submits=launcher.takes_all)
    jobs = Course(launcher, prepared.launcher_name, settings.max_parallel, told)
    with StopSignals() as signals, launcher if todo else nullcontext():
        course.run(
            jobs,
            todo,
            retry_failed=settings.retry_failed,
            fail_fast=settings.fail_fast,
            signals=signals,
            is_cancelled=lambda: process.is_cancelled,
        )
    conclude(folder, still_running=len(jobs.running))
    were_refused = any(ended.status is Status.failed for ended in jobs.ended.values())
    if launcher.detach and not signals.count and jobs.running and not were_refused:
        return FINISHED
    code = exit_code([_status(one, jobs, {other.job.name for other in todo}) for one in standings])
    if code == INTERRUPTED and not jobs.running:
        say("The same command goes on with what is not done.")
    return code


def conclude(folder: Path, *, still_running: int) -> None:
    """Writes the summary and shows it, and how to reach jobs that go on."""
    try:
        print_table(summary.write(folder), Console(highlight=False))
        say(f"summary: {shown_path(folder / 'summary.md')}")
    except (StoreError, OSError) as error:
        say(f"sdx: no summary is written ({error})", aside=True)
    if still_running:
        say(going_on(folder, still_running))


def _status(standing: Standing, jobs: Course, todo: set[str]) -> Status | None:
    """How a job stands at the end; one that was to run and did not is not done."""
    name = standing.job.name
    if name in jobs.ended:
        return jobs.ended[name].status
    return Status.interrupted if name in todo else standing.status


def _survey(prepared: Prepared, *, is_dry: bool) -> list[Standing]:
    """How the jobs stand, those included that were started by another launcher before. Dry, what
    is half handed in is left as it is: a look would take it back or let it start."""
    attach = attach_by(prepared.launcher_name, prepared.launcher)

    def attach_whole(job: Job, launch: Mapping[str, Any]) -> Handle | None:
        return None if launch.get("released") is False else attach(job, launch)

    return look(prepared.jobs, attach_whole if is_dry else attach)


def _show(prepared: Prepared, settings: SweeperSettings, standings: Sequence[Standing]) -> None:
    count, launcher = len(standings), prepared.launcher
    jobs = "1 job" if count == 1 else f"{count} jobs"
    most = settings.max_parallel or launcher.parallel
    pace = "all at once" if most is None else f"{most} at a time"
    heading = f"sweep {prepared.folder.name}: {jobs} on {prepared.launcher_name[4:]}, {pace}"
    show_plan(heading, standings, settings.retry_failed)
    runs = prepared.jobs[0].paths.root.parent
    say(f"runs: {shown_path(runs)}, this sweep: {shown_path(prepared.folder)}")


def _labels(jobs: Sequence[Job]) -> dict[str, str]:
    """What tells each job from the others, by its name."""
    differ = differing([job.overrides for job in jobs])
    return {job.name: label(own) for job, own in zip(jobs, differ, strict=True)}
