"""Jobs on their way: started as there is room, looked at until they end, stopped on request."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sdx.record.snapshot import SnapshotError
from sdx.record.status import RunStatus, Status
from sdx.record.stop_request import forget_stop
from sdx.record.store import StoreError
from sdx_launchers.jobs import Ended, Handle, Job, Launcher, LaunchError
from sdx_launchers.launch_record import write_job, write_outcome
from sdx_launchers.sweep.standing import Standing, look, settle
from sdx_launchers.sweep.stop_signals import StopSignals


class Told:
    """What is said of jobs on their way: nothing, unless by a subclass."""

    def started(self, handle: Handle) -> None:
        """A job was handed over."""

    def ended(self, job: Job, ended: Ended, seconds: float) -> None:
        """A job has ended that was running."""

    def refused(self, jobs: Sequence[Job], reason: str) -> None:
        """Jobs could not be started."""

    def stopping(self, handles: Sequence[Handle]) -> None:
        """Running jobs are asked to stop."""


@dataclass
class Course:
    """The jobs of one sweep, from the moment they are handed over to `launcher`.

    `ended` says how each has ended so far, by name.
    """

    launcher: Launcher
    launcher_name: str
    max_parallel: int | None
    told: Told = field(default_factory=Told)
    running: list[Handle] = field(default_factory=list)
    ended: dict[str, Ended] = field(default_factory=dict)
    _before: dict[str, RunStatus | None] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    def start(self, standings: Sequence[Standing]) -> None:
        """Hands jobs over; those that cannot be started have failed."""
        jobs = [one.job for one in standings]
        for one in standings:
            write_job(one.job, self.launcher_name)
            with suppress(OSError):  # the run does so too, if it comes that far
                forget_stop(one.job.paths)
            self._before[one.job.name] = one.before
            self._since[one.job.name] = time.monotonic()
        try:
            handles = self.launcher.start(jobs, self.max_parallel)
        except (LaunchError, SnapshotError) as error:
            self.ended |= {job.name: Ended(Status.failed, str(error)) for job in jobs}
            self.told.refused(jobs, str(error))
            return
        for handle in handles:
            self.running.append(handle)
            self.told.started(handle)

    def attach(self, handle: Handle) -> None:
        """Waits for a job that was started before."""
        self._since[handle.job.name] = time.monotonic()
        self.running.append(handle)

    def look(self) -> list[Job]:
        """The jobs that have ended since the last look."""
        over: list[Job] = []
        for handle in [*self.running]:
            try:
                said = handle.poll()
            except StoreError as error:
                if not error.may_pass:
                    raise
                continue  # where its run lies does not answer: asked again, the others go on
            if said is None:
                continue
            self.running.remove(handle)
            ended = settle(handle.job, said, self._before.get(handle.job.name))
            write_outcome(handle.job, ended)
            self.ended[handle.job.name] = ended
            self.told.ended(handle.job, ended, time.monotonic() - self._since[handle.job.name])
            over.append(handle.job)
        return over

    def stop(self) -> None:
        """Asks all that run to save and end; asked again, ends them."""
        self.told.stopping(self.running)
        for handle in self.running:
            handle.stop()


def run(
    course: Course,
    standings: Iterable[Standing],
    *,
    fail_fast: bool,
    signals: StopSignals,
    is_cancelled: Callable[[], bool],
) -> None:
    """Starts jobs in order and waits for all that run. One that an earlier sweep had started, and
    that was cut off with it, is started again. A sweep that is cancelled starts no more; whoever
    cancels it asks its runs to stop."""
    launcher = course.launcher
    attached: dict[str, Standing] = {}
    pending: deque[Standing] = deque()
    for one in standings:
        if one.handle is None:
            pending.append(one)
        else:
            attached[one.job.name] = one
            course.attach(one.handle)
    heard, is_stopping = 0, False
    while pending or course.running:
        while not signals.count and (room := _room(course, len(pending))) > 0:
            course.start([pending.popleft() for _ in range(room)])
        if launcher.detach and not pending:
            return
        over = course.look()
        failed = any(course.ended[job.name].status is Status.failed for job in over)
        for job in over:
            again = attached.pop(job.name, None)
            ended = course.ended[job.name].status
            if again is not None and ended is Status.interrupted and not is_stopping:
                del course.ended[job.name]
                pending += look([job], lambda job, launch: None)
        if pending and is_cancelled():
            is_stopping = True
            pending.clear()
        if signals.count and launcher.outlives_driver:
            return
        if signals.count > heard or (fail_fast and failed and not is_stopping):
            heard, is_stopping = signals.count, True
            pending.clear()
            course.stop()
        if course.running and not over:
            signals.wait(launcher.poll_s)


def _room(course: Course, pending: int) -> int:
    """How many jobs can be started at once."""
    launcher = course.launcher
    if launcher.takes_all:
        return pending
    limit = course.max_parallel or launcher.parallel or pending + len(course.running)
    return min(pending, limit - len(course.running), 1)
