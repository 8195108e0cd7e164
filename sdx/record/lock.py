"""One process per run folder: an owner's record with a heartbeat, taken over when it is dead.

On the owner's machine the process table decides: a dead pid frees the lock at once, and a pid that
was given to another process since counts as dead. From elsewhere the lease decides: no heartbeat
for `LEASE_S` means dead. Reading, deciding and writing happen under one `flock` on a guard file,
which the kernel drops with its process, so two takers cannot both win and a kill leaves nothing to
clean up.
"""

import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from sdx.record.files import now, read_json, write_json

LEASE_S = 60.0
_HEARTBEAT_S = LEASE_S / 4
# File systems without flock (some Lustre mounts): two takers are told apart by who is still there
# after this time.
_SETTLE_S = 1.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RefusedStart(ValueError):
    """The run was not touched: something the user decides stands in the way (exit code 2)."""


class RunLocked(RefusedStart):
    """Another living process owns the run folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `machine` is kernel and pid namespace: only there `pid` means anything."""

    owner: str
    pid: int
    process_started: int | None
    host: str
    machine: str
    since: str


class RunLock:
    """The lock of one run folder.

    `lost` turns true when another process took it over because we were asleep past the lease.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = False
        self._owner = _this_process()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock or raises RunLocked; a dead owner's lock is taken over."""
        with _guard(self.path) as has_flock:
            holder = _read(self.path)
            if holder is not None and holder != self._owner and _is_alive(holder, self.path):
                raise RunLocked(_refusal(self.path, holder))
            write_json(self.path, asdict(self._owner))
        if not has_flock:
            time.sleep(_SETTLE_S)
            holder = _read(self.path)
            if holder is not None and holder != self._owner:
                raise RunLocked(_refusal(self.path, holder))
        self._stop.clear()
        self._heart = threading.Thread(target=self._beat, name="sdx-lock-heartbeat", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Frees the lock if it is ours; harmless when it is not, or twice, or in a forked child."""
        if self._heart is None or os.getpid() != self._owner.pid:
            return
        self._stop.set()
        if self._heart is not threading.current_thread():
            self._heart.join()
        self._heart = None
        with _guard(self.path):
            if _read(self.path) == self._owner:
                self.path.unlink()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            try:
                with _guard(self.path):
                    if _read(self.path) != self._owner:
                        self.lost = True
                        return
                    os.utime(self.path)
            except (OSError, ValueError):
                continue  # a file system in trouble: the lease has room for three more tries


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock at `path`."""
    holder = _read(path)
    return holder is not None and _is_alive(holder, path)


def _this_process() -> Owner:
    pid = os.getpid()
    return Owner(
        owner=uuid.uuid4().hex,
        pid=pid,
        process_started=_process_started(pid),
        host=socket.gethostname(),
        machine=_machine(),
        since=now(),
    )


def _is_alive(holder: Owner, path: Path) -> bool:
    if holder.machine == _machine() and holder.host == socket.gethostname():
        if not _pid_exists(holder.pid):
            return False
        started = _process_started(holder.pid)
        return started == holder.process_started
    return _silence_s(path) <= LEASE_S


def _silence_s(path: Path) -> float:
    """Seconds since the last heartbeat, both ends by the clock of the lock's file system."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        probe.touch()
        there = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # a folder we may only read
        there = time.time()
    return there - path.stat().st_mtime


def _read(path: Path) -> Owner | None:
    fields = read_json(path)
    try:
        return None if fields is None else Owner(**fields)
    except TypeError as error:
        raise ValueError(f"{path}: not a lock of this version of sdx ({error}).") from error


@contextmanager
def _guard(path: Path) -> Iterator[bool]:
    """Holds the guard file beside the lock; yields whether the file system excludes others."""
    descriptor = os.open(path.with_name(f".{path.name}.guard"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile shares the descriptor
    finally:
        os.close(descriptor)


def _machine() -> str:
    """Kernel boot and pid namespace; containers of one host differ in the second."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{uuid.getnode():x}"  # no /proc (macOS): the network card's number


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = _stat_fields(pid)
    return stat is None or stat[0] not in "ZX"  # a zombie runs nothing


def _process_started(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started, or None where /proc is missing."""
    stat = _stat_fields(pid)
    return None if stat is None else int(stat[19])


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from its third field (state) on; the second may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _refusal(path: Path, holder: Owner) -> str:
    try:
        silence = f"{max(_silence_s(path), 0):.0f} s ago"
    except OSError:
        silence = "unknown"
    if holder.host == socket.gethostname():
        advice = f"wait for it, end it with `kill {holder.pid}`"
    else:
        advice = (
            f"wait for it, end it on {holder.host} "
            f"(if it is gone, the lock frees itself within {LEASE_S:.0f} s)"
        )
    return (
        f"{path.parent}: in use by process {holder.pid} on {holder.host} since {holder.since}, "
        f"last sign of life {silence}; {advice}, or use another run.name."
    )
