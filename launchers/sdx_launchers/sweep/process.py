"""The process that runs a sweep: there is one at a time, and others can ask it to end."""

from pathlib import Path
from types import TracebackType
from typing import Self

from sdx.record.files import now, write_json
from sdx.record.lock import RunLock, RunLocked, is_held
from sdx.record.owner import RefusedStart

_LOCK, _CANCEL = "lock.json", "cancel.json"


class SweepProcess:
    """Held by the process that runs the sweep in `folder`, while entered.

    Raises:
        RefusedStart: another living process runs it, or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = RunLock(folder / _LOCK)

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for the end of the whole sweep since it was entered."""
        return (self._folder / _CANCEL).exists()

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except RunLocked:
            raise RefusedStart(
                f"{self._folder.name}: another process runs this sweep; "
                f"`python -m sdx.runs {self._folder} --follow` shows it, --cancel ends it."
            ) from None
        except OSError as error:
            raise RefusedStart(
                f"{self._folder}: cannot be written ({error.strerror}); use another run.output_dir."
            ) from error
        (self._folder / _CANCEL).unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


def is_running(folder: Path) -> bool:
    """Whether a living process runs the sweep in `folder`."""
    return is_held(folder / _LOCK)


def ask_to_cancel(folder: Path) -> None:
    """Asks the process that runs the sweep to start no more jobs and to stop those it can."""
    write_json(folder / _CANCEL, {"asked": now()})
