"""One job on TPUs: brought to one, watched, and taken to the next when that one is lost."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from sdx.config.launching import TpuSettings
from sdx.record.launched import NODES
from sdx.record.lock import is_held
from sdx.record.owner import this_process
from sdx.record.snapshot import Snapshot
from sdx.record.status import Status
from sdx_launchers.jobs import Ended, Job, LaunchError
from sdx_launchers.launch_record import job_command, write_launch
from sdx_launchers.tpu.pool import Cancelled, Pool, Tpu, say
from sdx_launchers.tpu.remote_processes import RemoteEnd, RemoteProcesses
from sdx_launchers.tpu.ssh import Host
from sdx_launchers.tpu.workers import ConnectionLost, Worker, Workers

LAUNCHER = "sdx_tpu"
_EXIT_INTERRUPTED = 75
_LOOKS = {None: 6, _EXIT_INTERRUPTED: 3}  # at a TPU's state after an end; a preemption shows late
_LOCK_WITHIN_S = 600.0
_PORT = 8476  # where JAX's own processes meet on TPU VMs


class TpuRun:
    """The handle of a job; a thread does the work."""

    def __init__(
        self,
        job: Job,
        settings: TpuSettings,
        pool: Pool,
        snapshot: Snapshot,
        limit: int,
        make_workers: Callable[[Sequence[Host], TpuSettings, Path], Workers] = Workers,
    ):
        self.job = job
        self._settings = settings
        self._pool = pool
        self._snapshot = snapshot
        self._limit = limit
        self._make_workers = make_workers
        self._tpu: Tpu | None = None
        self._workers: Workers | None = None
        self._ended: Ended | None = None
        self._times_stopped = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sdx-{job.name}")
        write_launch(job, LAUNCHER, self.id, process=asdict(this_process()))

    @property
    def id(self) -> str:
        return "waiting for a TPU" if self._tpu is None else self._tpu.name

    def begin(self) -> None:
        self._thread.start()

    def poll(self) -> Ended | None:
        return self._ended

    def stop(self) -> None:
        self._times_stopped += 1
        self._stopped.set()
        if (workers := self._workers) is not None:
            workers.close()

    def join(self, timeout_s: float | None = None) -> None:
        """Waits for the job's end, with its TPU given back."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._ended = self._go()
        except Cancelled:
            self._ended = Ended(Status.interrupted, "stopped before it ran")
        except LaunchError as error:
            self._ended = Ended(Status.failed, str(error))
        except Exception as error:  # of ours: the sweep goes on, and shows it
            self._ended = Ended(Status.failed, f"{type(error).__name__}: {error}")
            say(traceback.format_exc().rstrip())

    def _go(self) -> Ended:
        losses = 0
        while True:
            self._wait_for_lock()
            if self._tpu is None:
                self._tpu = self._pool.take(self._limit, self._stopped)
                self._note()
            try:
                outcome = self._on(self._tpu)
            except BaseException:
                self._pool.give_back(self._tpu)
                raise
            if isinstance(outcome, Ended):
                self._pool.give_back(self._tpu)
                return outcome
            losses += 1
            self._leave_lost(self._tpu)
            if losses > self._settings.retries:
                reason = f"lost its TPU {losses} times, at last: {outcome}"
                return Ended(Status.interrupted, f"{reason}; the same command goes on")
            say(f"{self.job.name}: {outcome}; it goes on, {losses} of {self._settings.retries}")

    def _leave_lost(self, tpu: Tpu) -> None:
        """One that lives in spite of all is tried again: another one may take hours to come."""
        if self._pool.lost(tpu) is not None:
            self._tpu = None
            self._pool.discard(tpu)

    def _note(self) -> None:
        assert self._tpu is not None
        where = {"zone": self._settings.zone, "project": self._settings.project}
        process = asdict(this_process())
        write_launch(self.job, LAUNCHER, self.id, process=process, **where)

    def _on(self, tpu: Tpu) -> Ended | str:
        """How the job ended there; a text where the TPU, or the way to it, was lost."""
        wanted = self.job.config.hardware.num_hosts
        if len(tpu.hosts) != wanted:
            raise LaunchError(
                f"{tpu.name}: came with {len(tpu.hosts)} workers, "
                f"hardware={self.job.config.hardware.name} has hardware.num_hosts={wanted}."
            )
        folder = tpu_folder(self.job, tpu.name)
        workers = self._workers = self._make_workers(tpu.hosts, self._settings, folder)
        if self._stopped.is_set():
            raise Cancelled
        if (why := self._pool.lost(tpu)) is not None:  # while no job was on it
            return why
        try:
            workers.prepare(self._snapshot)
        except LaunchError as error:
            return self._not_prepared(tpu, error)
        if self._stopped.is_set():
            raise Cancelled
        processes = workers.start(
            self.job.name,
            lambda worker, number: _named(worker_argv(self.job, tpu.hosts[0], worker, number), tpu),
            self.job.folder,
            lease_s=60 * self._settings.lease_min,
            speaks=self._limit == 1,
        )
        return self._watch(tpu, processes)

    def _not_prepared(self, tpu: Tpu, error: LaunchError) -> str:
        """Why the TPU was lost; where it is there, the way to it is wrong, or the installation."""
        if self._stopped.is_set():
            raise Cancelled from None
        looks = _LOOKS[None] if isinstance(error, ConnectionLost) else 1
        if (why := self._look(tpu, looks)) is None:
            raise error
        return why

    def _watch(self, tpu: Tpu, processes: RemoteProcesses) -> Ended | str:
        """Looks at the processes, and whether their TPU is still there."""
        stops_said, look_at = 0, 0.0
        while (end := processes.poll()) is None:
            if self._times_stopped > stops_said:
                stops_said += 1
                (processes.stop if stops_said == 1 else processes.kill)()
                continue
            if time.monotonic() > look_at:
                why = self._pool.lost(tpu)
                if why is not None:
                    processes.kill()
                    return why
                look_at = time.monotonic() + self._settings.poll_s
            time.sleep(min(0.2, self._settings.poll_s))
        return self._outcome(tpu, end)

    def _outcome(self, tpu: Tpu, end: RemoteEnd) -> Ended | str:
        if end.code == 0:
            return Ended(Status.finished)
        if self._stopped.is_set():
            return Ended(Status.interrupted, "stopped")
        why = self._look(tpu, _LOOKS.get(end.code, 1))
        if why is not None:
            return why
        if end.code is None:
            return end.reason or "the connection was lost"
        if end.code == _EXIT_INTERRUPTED:
            return Ended(Status.interrupted, end.reason)
        return Ended(Status.failed, end.reason)

    def _look(self, tpu: Tpu, times: int) -> str | None:
        """Why the TPU was lost, if it was; waits a little for the API to know."""
        for look in range(times):
            if look and self._stopped.wait(self._settings.poll_s):
                return None
            if (why := self._pool.lost(tpu)) is not None:
                return why
        return None

    def _wait_for_lock(self) -> None:
        """Until nobody writes to the run any more: its processes on a lost TPU leave a lease."""
        deadline = time.monotonic() + _LOCK_WITHIN_S
        try:
            while self.job.command == "train" and is_held(self.job.paths.lock):
                if time.monotonic() > deadline:
                    raise LaunchError(f"{self.job.paths.root}: another process is at this run.")
                if self._stopped.wait(min(2.0, self._settings.poll_s)):
                    raise Cancelled
        except OSError as error:
            raise LaunchError(str(error)) from error


def tpu_folder(job: Job, name: str) -> Path:
    """The record of that job's time on the TPU `name`."""
    return job.folder / "tpus" / name


def _named(argv: list[str], tpu: Tpu) -> list[str]:
    """A process of the job that writes into its attempt on which nodes it ran."""
    return [argv[0], f"{NODES}={','.join(tpu.node_ids)}", *argv[1:]]


def worker_argv(job: Job, first: Host, worker: Worker, number: int) -> list[str]:
    """The job's process of one worker; `first` is the one of process 0.

    Real TPUs say in their metadata who is who (of several slices MEGASCALE_…, which Google sets for
    queued resources, and JAX reads); the CPU processes of a rehearsal are told.
    """
    argv = job_command(job, worker.python_path, worker.python, folder=worker.job_folder(job.name))
    hardware = job.config.hardware
    if not hardware.simulate or hardware.num_hosts == 1:
        return argv
    address = job.config.distributed.coordinator_address or f"{first.address}:{_PORT}"
    return [
        *argv,
        f"distributed.coordinator_address={address}",
        f"distributed.num_processes={hardware.num_hosts}",
        f"distributed.process_id={number}",
    ]
