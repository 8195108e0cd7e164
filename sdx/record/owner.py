"""Who holds a run folder, and whether that process still lives."""

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from sdx.record.files import now, read_json
from sdx.record.store import AnyPath

LEASE_S = 60.0


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


def read_owner(path: AnyPath) -> Owner | None:
    """Who wrote the lock at `path`; None without one."""
    fields = read_json(path)
    try:
        return None if fields is None else Owner(**fields)
    except TypeError as error:
        raise ValueError(f"{path}: not a lock of this version of sdx ({error}).") from error


def this_process() -> Owner:
    return owner_of(os.getpid())


def owner_of(pid: int) -> Owner:
    """That living process of this machine."""
    return Owner(
        owner=uuid.uuid4().hex,
        pid=pid,
        process_started=_process_started(pid),
        host=socket.gethostname(),
        machine=_machine(),
        since=now(),
    )


def lives_here(holder: Owner) -> bool | None:
    """Whether the holder's process runs on this machine; None where it was another machine's."""
    if holder.machine != _machine() or holder.host != socket.gethostname():
        return None
    return _pid_exists(holder.pid) and _process_started(holder.pid) == holder.process_started


def refusal(folder: AnyPath, holder: Owner, silence_s: float | None) -> str:
    """Why `folder` cannot be used, and what to do; `silence_s` since the last sign of life."""
    silence = "unknown" if silence_s is None else f"{max(silence_s, 0):.0f} s ago"
    if holder.host == socket.gethostname():
        advice = f"wait for it, end it with `kill {holder.pid}`"
    else:
        advice = (
            f"wait for it, end it on {holder.host} "
            f"(if it is gone, the lock frees itself within {LEASE_S:.0f} s)"
        )
    return (
        f"{folder}: in use by process {holder.pid} on {holder.host} since {holder.since}, "
        f"last sign of life {silence}; {advice}, or use another run.name."
    )


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
