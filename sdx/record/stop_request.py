"""Asking a run to stop from anywhere that sees its folder: `RUN/stop.json`.

The run's first process looks for it every few seconds; all its processes then agree on a step, save
and end as on a signal, with the status that was asked for. A start removes what was asked before.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sdx.record.files import DamagedRecord, now, read_json, write_json
from sdx.record.paths import RunPaths
from sdx.record.status import Status

LOOK_EVERY_S = 2.0
MAY_BE_ASKED = (Status.pruned, Status.cancelled, Status.interrupted)


@dataclass(frozen=True)
class StopRequest:
    """`status` is what the run will have when it has stopped; `reason` one line for people."""

    status: Status
    reason: str | None


def request_stop(paths: RunPaths, status: Status, reason: str | None = None) -> None:
    """Asks the run at `paths` to save and end as `status`, one of `MAY_BE_ASKED`; returns at once.

    A later request takes the place of an earlier one. A run that nobody started never hears it.
    """
    assert status in MAY_BE_ASKED, status
    write_json(paths.stop, {"status": status, "reason": reason, "asked": now()})


def read_stop(paths: RunPaths) -> StopRequest | None:
    """What the run was asked since its last start; None without a request, or one not readable."""
    try:
        fields = read_json(paths.stop)
        return fields if fields is None else StopRequest(Status[fields["status"]], fields["reason"])
    except (OSError, KeyError, DamagedRecord):
        return None


def forget_stop(paths: RunPaths) -> None:
    """Takes back what the run was asked before: it is to start again."""
    if paths.stop.is_file():  # stores differ in what removing nothing is
        paths.stop.unlink(missing_ok=True)


class StopWatch:
    """Calls `act` once when the run is asked to stop, from a thread of its own, while entered."""

    def __init__(self, paths: RunPaths, act: Callable[[], None], every_s: float = LOOK_EVERY_S):
        self._paths = paths
        self._act = act
        self._every_s = every_s
        self._is_over = threading.Event()
        self._acting = threading.Lock()

    def __enter__(self) -> "StopWatch":
        threading.Thread(target=self._watch, name="sdx-stop-request", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is done afterwards; a look on its way is not waited for."""
        with self._acting:
            self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(self._every_s):
            if read_stop(self._paths) is not None:
                with self._acting:
                    if not self._is_over.is_set():
                        self._act()
                return
