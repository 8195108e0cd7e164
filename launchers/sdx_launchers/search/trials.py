"""The trials of a search on their way: asked, run, watched, pruned, answered."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sdx.config.errors import ConfigError
from sdx.record.metrics import read_column
from sdx.record.status import Status
from sdx.record.stop_request import read_stop, request_stop
from sdx.record.store import StoreError, patiently
from sdx_launchers.jobs import Ended, Job
from sdx_launchers.saying import say
from sdx_launchers.search.study import Study, Trial
from sdx_launchers.sweep.course import Course
from sdx_launchers.sweep.objective import Objective
from sdx_launchers.sweep.stop_signals import StopSignals

Compose = Callable[[Sequence[str]], Job]
"""Overrides of a trial to its job; ConfigError where that cannot run."""


@dataclass
class _Running:
    """A run, and the trials that chose it: values may come up twice."""

    job: Job
    trials: list[Trial]
    pruned_for: str | None = None
    """Why it was asked to stop."""


@dataclass
class Trials:
    """`parallel` trials at a time, until there are `n_trials`; `write_down` is told every job."""

    study: Study
    course: Course
    compose: Compose
    objective: Objective
    parallel: int
    write_down: Callable[[Job], None]
    outcomes: list[Status] = field(default_factory=list)
    _running: dict[str, _Running] = field(default_factory=dict)
    _before: deque[Trial] = field(default_factory=deque)
    _times_stopped: int = 0

    def run(self, signals: StopSignals, is_cancelled: Callable[[], bool]) -> None:
        """Returns when all trials are answered, or when asked to stop: those that ran then are
        gone on with by the next start. A search that is cancelled asks for no more trials; whoever
        cancels it asks its runs to stop."""
        launcher = self.course.launcher
        if self.study.settings.retry_failed:
            self.study.retry_failed()
        self._before.extend(self.study.running())
        while True:
            if not is_cancelled():
                self._fill()
            if not self._running:
                return
            self._look()
            if signals.count and launcher.outlives_driver:
                return
            self._heed(signals.count)
            if self._running:
                signals.wait(launcher.poll_s)

    def _fill(self) -> None:
        """Begins trials while there is room."""
        while not self._times_stopped and self._num_open < self.parallel:
            if self._before:
                self._begin(self._before.popleft())
            elif self.study.num_trials < self.study.settings.n_trials:
                self._begin(self.study.ask())
            else:
                return
            self._heed(0)

    @property
    def _num_open(self) -> int:
        return sum(len(running.trials) for running in self._running.values())

    def _heed(self, times_asked: int) -> None:
        """Stops what runs when that is asked for, or after a failure where one is enough."""
        if self.study.settings.fail_fast and Status.failed in self.outcomes:
            times_asked = max(times_asked, 1)
        if times_asked > self._times_stopped:
            self._times_stopped = times_asked
            self.course.stop()

    def _begin(self, trial: Trial) -> None:
        """Starts the trial's run, unless it runs for another trial."""
        try:
            job = self._job(trial)
        except ConfigError as error:
            self._answer([trial], None, Ended(Status.failed, str(error)))
            return
        say(f"{trial.describe()} -> {job.name}")
        self.write_down(job)
        if job.name in self._running:
            self._running[job.name].trials.append(trial)
            return
        self._running[job.name] = _Running(job, [trial])
        self._start(job)

    def _start(self, job: Job) -> None:
        """Starts the run, waits for one that an earlier start began, or ends what has ended."""
        self.course.begin([job], retry_failed=self.study.settings.retry_failed)
        if job.name in self.course.ended:
            self._end(job.name, self.course.ended[job.name])

    def _job(self, trial: Trial) -> Job:
        """The trial's job, by the name it had from the first. Two trials that differ only in keys
        outside a run's identity are told apart by the number of the second."""
        job = self.compose(self.study.space.overrides(trial.values))
        name, runs = trial.run, self.study.runs()
        if name is None:
            same = [run for run, values in runs.items() if values == trial.values]
            new = f"{job.name}-trial{trial.number}" if job.name in runs else job.name
            name = same[0] if same else new
            trial.note_run(name)
        return job if name == job.name else _renamed(job, name)

    def _look(self) -> None:
        """Hears of runs what they measured and whether they ended."""
        for running in self._running.values():
            try:
                self._report(running)
            except (StoreError, ValueError):
                continue  # a store in trouble, or a row half written: heard the next time
        for job in self.course.look():
            if self.course.was_left(job) and not self._times_stopped:
                self._start(job)
            else:
                self._end(job.name, self.course.ended[job.name])

    def _report(self, running: _Running) -> None:
        """Tells what is new, a step at a time: other trials may have no value of a later one."""
        for step, value in self._column(running.job):
            news = [trial.report(step, value) for trial in running.trials]
            if any(news) and not running.pruned_for and running.trials[0].should_prune():
                said = "not finite" if value is None else f"{value:.4g}"
                running.pruned_for = f"{self.objective.metric} {said} at step {step} is worse"
                number = running.trials[0].number
                say(f"trial {number}: {running.pruned_for}; asked to stop")
        paths = running.job.paths
        if running.pruned_for and read_stop(paths) is None:  # its start removes what was there
            request_stop(paths, Status.pruned, running.pruned_for)

    def _column(self, job: Job) -> list[tuple[int, float | None]]:
        return read_column(job.paths.metrics, self.objective.metric)

    def _end(self, name: str, ended: Ended) -> None:
        running = self._running.pop(name)
        if running.pruned_for and ended.status is Status.interrupted:  # before it could say so
            ended = Ended(Status.pruned, ended.reason)
        self._answer(running.trials, running.job, ended)

    def _answer(self, trials: Sequence[Trial], job: Job | None, ended: Ended) -> None:
        """Tells the study; a trial that was interrupted stays as it is, to be gone on with."""
        self.outcomes.append(ended.status)
        column = patiently(lambda: self._column(job)) if job else []
        best = self.objective.best(column)
        if ended.status is Status.finished and best is None:
            ended = Ended(Status.failed, f"{self.objective.metric} was never measured")
            self.outcomes[-1] = Status.failed
        for trial in trials:
            for step, value in column:
                trial.report(step, value)
            match ended.status:
                case Status.finished:
                    assert best is not None and best.value is not None
                    trial.complete(best.value)
                case Status.pruned:
                    trial.prune()
                case Status.cancelled:
                    trial.cancel()
                case Status.failed:
                    trial.fail()
            said = f" {self.objective.metric} {best.value:.4g} at step {best.step}" if best else ""
            reason = f": {ended.reason}" if ended.reason else ""
            say(f"trial {trial.number}: {ended.status.name}{said}{reason}")


def _renamed(job: Job, name: str) -> Job:
    config = replace(job.config, run=replace(job.config.run, name=name))
    return replace(
        job,
        name=name,
        config=config,
        paths=replace(job.paths, root=job.paths.root.parent / name),
        folder=job.folder.with_name(name),
    )
