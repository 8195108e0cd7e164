"""Jobs as processes of this machine, each with its share of the cores and GPUs.

They end with the sweep, however that ends: a job is asked to save and leave when the pipe it was
handed is closed (sdx/record/launched.py).
"""

import codecs
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from sdx.config.errors import Problem
from sdx.config.launching import LocalSettings
from sdx.record.launched import PATIENCE_S, PIPE
from sdx.record.owner import Owner, lives_here, owner_of
from sdx.record.snapshot import Snapshot, take_snapshot
from sdx.record.status import Status
from sdx_launchers.jobs import Ended, Job, LaunchError
from sdx_launchers.launch_record import SNAPSHOTS, job_command, write_launch
from sdx_launchers.local.shares import Share, share_out, this_machine
from sdx_launchers.saying import say

_LOG = "log.txt"
_LOOK_EVERY_S = 0.1
_MOST_CHARACTERS = 300  # of a log's last line, as a reason
_BY_CODE = {0: Status.finished, 75: Status.interrupted}
_CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


class LocalLauncher:
    """hydra/launcher=sdx_local."""

    parallel = 1
    takes_all = False
    outlives_driver = False
    detach = False

    def __init__(self, settings: LocalSettings):
        self.poll_s = settings.poll_s
        self._pins = settings.pin
        self._python = settings.python or sys.executable
        self._children: list[_Child] = []
        self._snapshot: Snapshot | None = None

    def problems(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        """None that are known before: what the machine lacks, the run itself finds."""
        return []

    def describe(self, jobs: Sequence[Job], max_parallel: int | None) -> str:
        """A command line for each job, with its share of the machine before it."""
        shares = self._shares(max_parallel or self.parallel)
        lines = []
        for number, job in enumerate(jobs):
            share = shares[number % len(shares)]
            argv = job_command(job, [_snapshots(job) / "DIGEST"], self._python)
            log = shlex.quote(str(job.folder / _LOG))
            lines.append(f"{share.describe()}{shlex.join(argv)} >> {log} 2>&1")
        return "\n".join(lines)

    def start(self, jobs: Sequence[Job], max_parallel: int | None) -> Sequence["_Child"]:
        """One after the other speaks to the terminal as well; several at a time to their logs."""
        count = max_parallel or self.parallel
        started: list[_Child] = []
        try:
            for job in jobs:
                started.append(self._start(job, count))
        except (OSError, LaunchError) as error:
            for child in started:
                child.kill()
            if isinstance(error, LaunchError):
                raise
            raise LaunchError(
                f"hydra/launcher=sdx_local: no process can start ({error})."
            ) from None
        return started

    def attach(self, job: Job, launch: Mapping[str, Any]) -> "_Attached | None":
        """The process of another sweep; none where it has ended, or is on another machine: there
        the run's own record tells."""
        attached = _Attached(job, Owner(**launch["process"]))
        return attached if attached.is_alive() else None

    def __enter__(self) -> "LocalLauncher":
        self._pipe, self._our_end = os.pipe()
        return self

    def __exit__(self, *error: object) -> None:
        running = [child for child in self._children if child.is_running()]
        for child in running:
            child.stop()
        deadline = time.monotonic() + PATIENCE_S
        try:
            while any(child.is_running() for child in running) and time.monotonic() < deadline:
                time.sleep(_LOOK_EVERY_S)
        finally:
            for child in running:
                child.kill()
            os.close(self._our_end)
            os.close(self._pipe)

    def _start(self, job: Job, count: int) -> "_Child":
        taken = {child.slot for child in self._children if child.is_running()}
        slot = next(number for number in range(len(taken) + 1) if number not in taken)
        shares = self._shares(count)
        share = shares[slot % len(shares)]
        _check(job, share, count)
        argv = job_command(job, self._code(job).python_path, self._python)
        environment = os.environ | share.environment() | {
            PIPE: str(self._pipe), "PYTHONUNBUFFERED": "1"
        }  # fmt: skip
        path = job.folder / _LOG
        with open(path, "ab") as log, _on(share):
            said_before = log.tell()
            process = subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._pipe],
                start_new_session=True,  # Ctrl-C comes to the sweep alone, which asks its jobs
            )
        child = _Child(job, process, slot, path, said_before, speaks=count == 1)
        self._children.append(child)
        owner = owner_of(process.pid)
        write_launch(job, "sdx_local", child.id, process=asdict(owner))
        return child

    def _code(self, job: Job) -> Snapshot:
        """All jobs of a sweep run the code there was when the first of them started."""
        if self._snapshot is None:
            self._snapshot = take_snapshot(_snapshots(job))
        return self._snapshot

    def _shares(self, count: int) -> list[Share]:
        if not self._pins:
            return [Share((), ())]
        return share_out(*this_machine(), count)


class _Child:
    """A job that this process started."""

    def __init__(
        self,
        job: Job,
        process: subprocess.Popen[bytes],
        slot: int,
        log: Path,
        said_before: int,
        *,
        speaks: bool,
    ):
        self.job = job
        self.id = str(process.pid)
        self.slot = slot
        self._process = process
        self._log = open(log, "rb")  # noqa: SIM115  # closed when the job has ended
        self._log.seek(said_before)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._speaks = speaks
        self._times_stopped = 0

    def is_running(self) -> bool:
        return self._process.poll() is None

    def poll(self) -> Ended | None:
        code = self._process.poll()
        if not self._log.closed and self._speaks:
            say(self._decode(self._log.read()), end="")
        if code is None:
            return None
        ended = self._ended(code)
        self._log.close()
        return ended

    def stop(self) -> None:
        self._times_stopped += 1
        if self._times_stopped > 1:
            self.kill()
        elif self.is_running():
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.is_running():
            self._process.kill()
        self._process.wait()

    def _ended(self, code: int) -> Ended:
        if code in _BY_CODE:
            return Ended(_BY_CODE[code])
        if code < 0 and self._times_stopped:
            return Ended(Status.interrupted)
        if code < 0:  # by its own doing, or killed by somebody: then the same command goes on
            number = signal.Signals(-code)
            status = Status.failed if number in _CRASHES else Status.interrupted
            return Ended(status, f"ended by {number.name}")
        last = _last_line(self._log)
        return Ended(Status.failed, f"exit code {code}{last and ': '}{last}")


class _Attached:
    """A job of another sweep on this machine, which lives, or was killed and has the job save."""

    def __init__(self, job: Job, process: Owner):
        self.job = job
        self.id = str(process.pid)
        self._process = process
        self._is_left = False

    def is_alive(self) -> bool:
        return lives_here(self._process) is True

    def poll(self) -> Ended | None:
        if self._is_left:
            return Ended(Status.interrupted, "it goes on elsewhere")
        return None if self.is_alive() else Ended(Status.interrupted, "its sweep ended")

    def stop(self) -> None:
        """It is its own sweep's to stop."""
        self._is_left = True


def _snapshots(job: Job) -> Path:
    return job.folder.parent.parent / SNAPSHOTS


def _check(job: Job, share: Share, count: int) -> None:
    """LaunchError where a job needs more GPUs than its share."""
    hardware = job.config.hardware
    needs = hardware.num_devices or 1
    if not share.gpus or count == 1 or hardware.platform.name != "gpu" or hardware.simulate:
        return
    if needs > len(share.gpus):
        raise LaunchError(
            f"hydra.sweeper.max_parallel={count}: gives a job {len(share.gpus)} GPUs of this "
            f"machine, hardware={hardware.name} needs {needs}; run fewer at a time."
        )


@contextmanager
def _on(share: Share) -> Iterator[None]:
    """Processes started within have the share's cores: a thread's set is inherited."""
    if not share.cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share.cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _last_line(log: IO[bytes]) -> str:
    log.seek(max(0, os.fstat(log.fileno()).st_size - 10 * _MOST_CHARACTERS))
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:_MOST_CHARACTERS] if lines else ""
