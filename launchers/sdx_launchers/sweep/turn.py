"""Of all sweeps of an outputs folder one at a time looks how jobs stand and starts them: two that
share a job would both start it, or one would take back what the other is just handing in."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdx.record.lock import RunLock, RunLocked
from sdx_launchers.saying import say

_LOCK = ".lock.json"  # beside the folders of the jobs
_LOOK_EVERY_S = 0.1
_SAID_AFTER_S = 10.0  # a start takes seconds


@contextmanager
def turn(launches: Path) -> Iterator[None]:
    """Held by one process at a time, waited for; `launches` is the folder of the jobs' folders."""
    launches.mkdir(parents=True, exist_ok=True)
    lock = RunLock(launches / _LOCK)
    _acquire(lock)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: RunLock) -> None:
    since, is_said = time.monotonic(), False
    while True:
        try:
            return lock.acquire()
        except RunLocked as held:
            if not is_said and time.monotonic() - since > _SAID_AFTER_S:
                is_said = True
                say(f"sdx: another sweep is starting its jobs, waited for; {held}", aside=True)
        time.sleep(_LOOK_EVERY_S)
