"""Jobs on their way: started as there is room, looked at until they end, stopped on request."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from sdx.record.snapshot import SnapshotError
from sdx.record.status import RunStatus, Status
from sdx.record.stop_request import forget_stop
from sdx.record.store import StoreError
from sdx_launchers.jobs import Ended, Handle, Job, Launcher, LaunchError
from sdx_launchers.launch_record import read_job, write_job, write_outcome
from sdx_launchers.places import attach_by
from sdx_launchers.sweep.standing import ELSEWHERE, Standing, look, settle
from sdx_launchers.sweep.stop_signals import StopSignals
from sdx_launchers.sweep.turn import turn


class Told:
    """What is said of jobs on their way: nothing, unless by a subclass."""

    def started(self, handle: Handle) -> None:
        """A job was handed over."""

    def ended(self, job: Job, ended: Ended, seconds: float) -> None:
        """A job has ended that was running."""

    def elsewhere(self, handle: Handle) -> None:
        """A job that was to be started has been by somebody else meanwhile."""

    def settled(self, job: Job, ended: Ended) -> None:
        """A job that was to be started has ended by somebody else's doing meanwhile."""

    def left(self, job: Job) -> None:
        """A job that was waited for was stopped where it ran: it is this sweep's to go on with."""

    def refused(self, jobs: Sequence[Job], reason: str) -> None:
        """Jobs could not be started."""

    def leaving(self, handle: Handle) -> None:
        """A job of somebody else is waited for no longer; it goes on."""

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
    _attached: set[str] = field(default_factory=set)
    _leaving: set[str] = field(default_factory=set)
    _by: dict[str, str | None] = field(default_factory=dict)  # the sweeps that started them
    _before: dict[str, RunStatus | None] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    def begin(self, jobs: Sequence[Job], *, retry_failed: bool) -> list[Job]:
        """Starts jobs; one that somebody else has started since it was looked at is waited for.
        Returns those that are over: somebody else has done them, or they cannot be started.

        Raises:
            StoreError: a store does not say how they stand; none was started.
        """
        attach = attach_by(self.launcher_name, self.launcher)
        try:
            with turn(jobs[0].folder.parent):
                standings = look(jobs, attach)
                to_start = [one for one in standings if one.is_to_start(retry_failed)]
                for job in jobs:
                    self.ended.pop(job.name, None)
                    self._attached.discard(job.name)
                if to_start:
                    self._start(to_start)
        except StoreError:
            raise
        except OSError as error:  # a full disk
            self._refuse(jobs, error)
            return [*jobs]
        for one in standings:
            if one.handle is not None:
                self.attach(one.handle)
                self.told.elsewhere(one.handle)
            elif one not in to_start:
                assert one.status is not None
                self.ended[one.job.name] = Ended(one.status, one.reason)
                self.told.settled(one.job, self.ended[one.job.name])
        return [job for job in jobs if job.name in self.ended]

    def attach(self, handle: Handle) -> None:
        """Waits for a job that was started before."""
        self._since[handle.job.name] = time.monotonic()
        self._attached.add(handle.job.name)
        self._by[handle.job.name] = _starter(handle.job)
        self.running.append(handle)

    def was_left(self, job: Job) -> bool:
        """Whether it was waited for, and was cut off with whoever had started it."""
        return job.name in self._attached and self.ended[job.name].status is Status.interrupted

    def look(self) -> list[Job]:
        """The jobs that have ended since the last look."""
        over: list[Job] = []
        for handle in [*self.running]:
            if handle.job.name in self._leaving:
                self.running.remove(handle)
                self.ended[handle.job.name] = Ended(Status.interrupted, "it goes on elsewhere")
                over.append(handle.job)
                continue
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
            if _starter(handle.job) == self._by[handle.job.name]:  # not started anew since
                with suppress(OSError):  # a full disk: the run's own record has it
                    write_outcome(handle.job, ended)
            self.ended[handle.job.name] = ended
            self.told.ended(handle.job, ended, time.monotonic() - self._since[handle.job.name])
            over.append(handle.job)
        return over

    def stop(self) -> None:
        """Asks all that run to save and end; asked again, ends them. What another sweep or a person
        has started is left to go on."""
        own: list[Handle] = []
        for handle in self.running:
            name = handle.job.name
            if handle.id != ELSEWHERE and self._by[name] in (None, handle.job.sweep):
                own.append(handle)
            elif name not in self._leaving:
                self._leaving.add(name)
                self.told.leaving(handle)
        self.told.stopping(own)
        for handle in own:
            handle.stop()

    def _start(self, standings: Sequence[Standing]) -> None:
        """Hands jobs over; those that cannot be started have failed."""
        jobs = [one.job for one in standings]
        for one in standings:
            write_job(one.job, self.launcher_name)
            with suppress(OSError):  # the run does so too, if it comes that far
                forget_stop(one.job.paths)
            self._by[one.job.name] = one.job.sweep
            self._before[one.job.name] = one.before
            self._since[one.job.name] = time.monotonic()
        try:
            handles = self.launcher.start(jobs, self.max_parallel)
        except (LaunchError, SnapshotError) as error:
            self._refuse(jobs, error)
            return
        for handle in handles:
            self.running.append(handle)
            self.told.started(handle)

    def _refuse(self, jobs: Sequence[Job], error: Exception) -> None:
        self.ended |= {job.name: Ended(Status.failed, str(error)) for job in jobs}
        self.told.refused(jobs, str(error))


def run(
    course: Course,
    standings: Iterable[Standing],
    *,
    retry_failed: bool,
    fail_fast: bool,
    signals: StopSignals,
    is_cancelled: Callable[[], bool],
) -> None:
    """Starts jobs in order and waits for all that run. One that another sweep had started, and
    that was cut off with it, is started again. A sweep that is cancelled starts no more; whoever
    cancels it asks its runs to stop."""
    launcher = course.launcher
    pending: deque[Job] = deque()
    for one in standings:
        if one.handle is None:
            pending.append(one.job)
        else:
            course.attach(one.handle)

    def is_enough(over: Sequence[Job]) -> bool:
        return fail_fast and any(course.ended[job.name].status is Status.failed for job in over)

    heard, is_stopping = 0, False
    while pending or course.running:
        over: list[Job] = []
        while not signals.count and not is_enough(over) and (room := _room(course, len(pending))):
            try:
                over += course.begin([*islice(pending, room)], retry_failed=retry_failed)
            except StoreError as error:
                if not error.may_pass:
                    raise
                break  # as long as nobody can tell how a job stands it is not started
            for _ in range(room):
                pending.popleft()
        if launcher.detach and not pending:
            return
        over += course.look()
        for job in over:
            if course.was_left(job) and not is_stopping:
                course.told.left(job)
                pending.append(job)
        if pending and is_cancelled():
            is_stopping = True
            pending.clear()
        if signals.count and launcher.outlives_driver:
            return
        if signals.count > heard or (is_enough(over) and not is_stopping):
            heard, is_stopping = signals.count, True
            pending.clear()
            course.stop()
        if (course.running or pending) and not over:
            signals.wait(launcher.poll_s)


def _starter(job: Job) -> str | None:
    """The sweep whose job the record is of."""
    noted = read_job(job.folder)
    return None if noted is None else str(noted["sweep"])


def _room(course: Course, pending: int) -> int:
    """How many jobs can be started at once."""
    launcher = course.launcher
    if launcher.takes_all:
        return pending
    limit = course.max_parallel or launcher.parallel or pending + len(course.running)
    return max(0, min(pending, limit - len(course.running), 1))
