"""One process per run folder: an owner's record with a heartbeat, taken over when it is dead.

On the owner's machine the process table decides: a dead pid frees the lock at once, and a pid that
was given to another process since counts as dead. From elsewhere the lease decides: no heartbeat
for `LEASE_S` means dead. In a file system reading, deciding and writing happen under one `flock` on
a guard file, which the kernel drops with its process, so two takers cannot both win and a kill
leaves nothing to clean up. How it is done in an object store: `object_lease`.
"""

import errno
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from sdx.record import object_lease
from sdx.record.files import write_json
from sdx.record.object_lease import ObjectLease
from sdx.record.owner import (
    LEASE_S,
    Owner,
    RefusedStart,
    RunLocked,
    lives_here,
    read_owner,
    refusal,
    this_process,
)
from sdx.record.store import AnyPath, ObjectPath

__all__ = ["LEASE_S", "RefusedStart", "RunLock", "RunLocked", "is_held"]

_HEARTBEAT_S = LEASE_S / 4
# File systems without flock (some Lustre mounts): two takers are told apart by who is still there
# after this time.
_SETTLE_S = 1.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """The lock of one run folder.

    `lost` turns true when another process took it over because we were asleep past the lease.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self.lost = False
        self._owner = this_process()
        self._lease = (
            ObjectLease(path, self._owner)
            if isinstance(path, ObjectPath)
            else _FileLease(path, self._owner)
        )
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock or raises RunLocked; a dead owner's lock is taken over."""
        self._lease.claim()
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
        self._lease.free()

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
                if not self._lease.renew():
                    self.lost = True
                    return
            except (OSError, ValueError):
                continue  # a file system in trouble: the lease has room for three more tries


def is_held(path: AnyPath) -> bool:
    """Whether a living process holds the lock at `path`."""
    if isinstance(path, ObjectPath):
        return object_lease.is_held(path)
    holder = read_owner(path)
    return holder is not None and _is_alive(holder, path)


class _FileLease:
    """The lock as a file whose time of change is the heartbeat."""

    def __init__(self, path: Path, owner: Owner):
        self._path = path
        self._owner = owner

    def claim(self) -> None:
        path = self._path
        with _guard(path) as has_flock:
            holder = read_owner(path)
            if holder is not None and holder != self._owner and _is_alive(holder, path):
                raise RunLocked(_refusal(path, holder))
            write_json(path, asdict(self._owner))
        if not has_flock:
            time.sleep(_SETTLE_S)
            holder = read_owner(path)
            if holder is not None and holder != self._owner:
                raise RunLocked(_refusal(path, holder))

    def renew(self) -> bool:
        """Notes a sign of life; False where the lock is another's by now."""
        with _guard(self._path):
            if read_owner(self._path) != self._owner:
                return False
            os.utime(self._path)
            return True

    def free(self) -> None:
        with _guard(self._path):
            if read_owner(self._path) == self._owner:
                self._path.unlink()


def _is_alive(holder: Owner, path: Path) -> bool:
    here = lives_here(holder)
    return _silence_s(path) <= LEASE_S if here is None else here


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


def _refusal(path: Path, holder: Owner) -> str:
    try:
        silence = _silence_s(path)
    except OSError:
        silence = None
    return refusal(path.parent, holder, silence)
