"""What became of a run: `status.json`, which says whether it is done; exit codes come second."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sdx.record.behind import write_json_later
from sdx.record.files import now, read_json, write_json
from sdx.record.lock import is_held
from sdx.record.paths import RunPaths


class Status(Enum):
    queued = "queued"
    running = "running"
    interrupted = "interrupted"
    finished = "finished"
    failed = "failed"
    pruned = "pruned"
    cancelled = "cancelled"


@dataclass(frozen=True)
class RunStatus:
    """`step` is the last step done as far as known; `reason` one line for people, or None."""

    status: Status
    step: int
    updated: str
    reason: str | None = None


def write_status(
    paths: RunPaths,
    status: Status,
    *,
    step: int,
    reason: str | None = None,
    later: bool = False,
) -> RunStatus:
    """Replaces status.json; `later` leaves it to `behind` where it goes to a store."""
    written = RunStatus(status, step, now(), reason)
    fields: Mapping[str, Any] = {
        "status": status,
        "step": step,
        "updated": written.updated,
        "reason": reason,
    }
    (write_json_later if later else write_json)(paths.status, fields)
    return written


def read_status(paths: RunPaths) -> RunStatus | None:
    """The run's status, or None without one; `running` with a dead lock reads as interrupted."""
    fields = read_json(paths.status)
    if fields is None:
        return None
    status = Status[fields["status"]]
    if status is Status.running and not is_held(paths.lock):
        status = Status.interrupted
    return RunStatus(status, int(fields["step"]), fields["updated"], fields.get("reason"))
