"""A search from its first check to its summary: values that Optuna chooses, by any launcher.

Its folder is a sweep's, with the journal of the trials. The trial's values, not its number, name
its run: killed at any point, the same command goes on with the same runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdx.config.errors import ConfigError, Problem
from sdx.config.launching import SearchSettings
from sdx.config.leaves import spelled
from sdx.config.sweeping import SweepRequest, SweptJob, is_of_hydra
from sdx.record.files import DamagedRecord
from sdx.record.lock import RefusedStart
from sdx.record.snapshot import SnapshotError
from sdx.record.store import StoreError
from sdx_launchers.jobs import Job, Launcher
from sdx_launchers.saying import say
from sdx_launchers.search.space import Space, read_space
from sdx_launchers.search.study import Study, check_installed
from sdx_launchers.search.trials import Trials
from sdx_launchers.sweep.course import Course
from sdx_launchers.sweep.driver import FAILED, FINISHED, INTERRUPTED, REFUSED, conclude
from sdx_launchers.sweep.folder import (
    add_to_manifest,
    make_jobs,
    name_problems,
    sweep_folder,
    sweep_name,
)
from sdx_launchers.sweep.objective import Objective, parse_objective
from sdx_launchers.sweep.plan import shown_path
from sdx_launchers.sweep.process import SweepProcess
from sdx_launchers.sweep.stop_signals import StopSignals

_JOURNAL = "journal.log"


@dataclass(frozen=True)
class _Search:
    """A search without faults, of which nothing is written yet; `corner` is one of its jobs."""

    request: SweepRequest
    settings: SearchSettings
    launcher: Launcher
    launcher_name: str
    parallel: int
    space: Space
    objective: Objective
    name: str
    corner: Job

    @property
    def folder(self) -> Path:
        return sweep_folder(self.corner.config, self.name)

    def compose(self, overrides: Sequence[str]) -> Job:
        return make_jobs("train", self.request.compose([overrides]), self.name)[0]

    def write_down(self, job: Job) -> None:
        """Notes the job in the manifest of the sweep."""
        add_to_manifest(
            self.folder,
            job,
            command="train",
            overrides=self.request.overrides,
            launcher=self.launcher_name,
            objective=str(self.objective),
        )


def search(request: SweepRequest, settings: SearchSettings, name: str, launcher: Launcher) -> int:
    """Runs trials by `launcher`, which is called `name`; returns the exit code. Raises ConfigError
    where something keeps it from being started, a corner of the space included."""
    asked = _prepare(request, settings, name, launcher)
    try:
        if settings.dry_run:
            return _dry_run(asked)
        with SweepProcess(asked.folder) as process:
            return _run(asked, process)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (RefusedStart, StoreError, DamagedRecord, SnapshotError) as error:
        say(f"sdx: {error}", aside=True)
        return REFUSED


def _prepare(
    request: SweepRequest, settings: SearchSettings, name: str, launcher: Launcher
) -> _Search:
    own = [text for text in request.overrides if not is_of_hydra(text)]
    space, problems = read_space(settings.params, own, settings.zip)
    objective = parse_objective(settings.objective)
    parallel = settings.max_parallel or launcher.parallel
    problems += [*check_installed(), *name_problems(settings.name)]
    problems += [objective] if isinstance(objective, Problem) else []
    if request.command != "train":
        rule, fix = "chooses by metrics, which only training has", "use hydra/sweeper=sdx"
        problems.append(Problem("hydra/sweeper", "sdx_search", rule, fix))
    if launcher.detach:
        rule, fix = "a search waits for results to choose by", "drop it"
        problems.append(Problem("hydra.launcher.detach", "true", rule, fix))
    if parallel is None:
        rule, fix = "a search needs to know how many trials run at a time", "give a number, as 4"
        problems.append(Problem("hydra.sweeper.max_parallel", "null", rule, fix))
    if problems or isinstance(objective, Problem) or parallel is None:
        raise ConfigError(problems)
    corners = _corners(request, space, objective)
    text = "\n".join(
        ["search", space.describe(), str(objective), settings.sampler.name, str(settings.seed)]
    )
    sweep = sweep_name(text, corners, settings.name)
    jobs = make_jobs("train", corners, sweep)
    if problems := launcher.problems(jobs, None):  # trials are handed over one by one
        raise ConfigError(problems)
    return _Search(request, settings, launcher, name, parallel, space, objective, sweep, jobs[0])


def _corners(request: SweepRequest, space: Space, objective: Objective) -> list[SweptJob]:
    """Trials at the ends of the space; ConfigError where one of them cannot run, or has nothing to
    be judged by."""
    try:
        corners = request.compose(list(space.corners()))
    except ConfigError as error:
        faults = list({str(problem): problem for problem in error.problems}.values())
        rule, fix = "some of the values it may choose cannot run", "leave them out"
        raise ConfigError([*faults, Problem("hydra/sweeper", "sdx_search", rule, fix)]) from None
    never = objective.metric.startswith("validation_loss")
    if never and any(corner.config.eval.every is None for corner in corners):
        fix = "give eval.every=STEPS, or judge by another: hydra.sweeper.objective=loss"
        rule = "is not measured with eval.every=null"
        raise ConfigError([Problem("hydra.sweeper.objective", str(objective), rule, fix)])
    return corners


def _dry_run(search: _Search) -> int:
    """Shows the space and what the first trials would be."""
    say(f"{_heading(search)}\n{search.space.describe()}")
    study = Study(None, search.space, search.settings, search.objective)
    count = min(search.parallel, search.settings.n_trials)
    trials = [study.ask() for _ in range(count)]
    first = [search.compose(search.space.overrides(trial.values)) for trial in trials]
    for trial, job in zip(trials, first, strict=True):
        say(f"{trial.describe()} -> {job.name}")
    say(search.launcher.describe(first, search.settings.max_parallel))
    say("dry run: nothing was started.")
    return 0


def _run(search: _Search, process: SweepProcess) -> int:
    settings, launcher, folder = search.settings, search.launcher, search.folder
    say(f"{_heading(search)}\n{search.space.describe()}")
    study = Study(folder / _JOURNAL, search.space, settings, search.objective)
    if study.counts():
        say(f"so far: {_counts(study)}")
    course = Course(launcher, search.launcher_name, settings.max_parallel)
    trials = Trials(
        study, course, search.compose, search.objective, search.parallel, search.write_down
    )
    with StopSignals() as signals, launcher:
        trials.run(signals, lambda: process.is_cancelled)
    conclude(folder, still_running=len(course.running))
    say(f"{study.num_trials} of {settings.n_trials} trials: {_counts(study)}")
    if (best := study.best()) is not None:
        values = " ".join(f"{name}={spelled(value)}" for name, value in best[2].items())
        say(f"best: trial {best[0]}, {search.objective.metric} {best[1]:.6g}, {values}")
    return _exit_code(study)


def _exit_code(study: Study) -> int:
    counts = study.counts()
    if "fail" in counts:
        return FAILED
    is_done = study.num_trials >= study.settings.n_trials and not {"running", "cancelled"} & {
        *counts
    }
    return FINISHED if is_done else INTERRUPTED


def _heading(search: _Search) -> str:
    settings = search.settings
    how = f"{settings.n_trials} trials, {search.parallel} at a time, by {settings.sampler.name}"
    judged = f"judged by {search.objective}, pruned by {settings.pruner.name}"
    return f"search {search.name}: {how}; {judged} -> {shown_path(search.folder)}"


def _counts(study: Study) -> str:
    return ", ".join(f"{number} {state}" for state, number in study.counts().items())
