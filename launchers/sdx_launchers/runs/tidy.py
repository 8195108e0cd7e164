"""The copies of code in an outputs folder, deleted when no job there needs one any more.

All or none: a job that runs, or that a scheduler starts later or again, reads the copy that was
taken when it was handed over. What has ended needs none, as a new start takes a new copy.
"""

from pathlib import Path
from typing import cast

from sdx.config.launching import LAUNCHERS
from sdx.config.schema import Config
from sdx.record.lock import is_held
from sdx.record.owner import Owner, lives_here
from sdx.record.paths import RunPaths
from sdx.record.snapshot import remove_snapshots
from sdx.record.store import AnyPath, as_path
from sdx_launchers.jobs import Job
from sdx_launchers.launch_record import (
    LAUNCHES,
    SNAPSHOTS,
    SWEEPS,
    read_job,
    read_launch,
    read_outcome,
)
from sdx_launchers.places import make_launcher
from sdx_launchers.runs.found import NothingFound
from sdx_launchers.sweep.process import is_running
from sdx_launchers.sweep.turn import turn

_NAMED = 5


def tidy(place: AnyPath) -> str:
    """Deletes the copies below the outputs folder `place`; says what was done.

    Raises:
        NothingFound: there are none, or something goes on that may need one.
    """
    if not isinstance(place, Path) or not (place / SNAPSHOTS).is_dir():
        raise NothingFound(f"{place}: has no folder {SNAPSHOTS}; --tidy takes an outputs folder.")
    with turn(place / LAUNCHES):  # nobody takes a copy meanwhile
        needing = [path.name for path in _folders(place / SWEEPS) if is_running(path)]
        needing += [path.name for path in _folders(place / LAUNCHES) if _may_need_code(path)]
        if needing:
            names = ", ".join(needing[:_NAMED]) + ", ..." * (len(needing) > _NAMED)
            raise NothingFound(
                f"{place / SNAPSHOTS}: nothing is deleted, it may be the code of what goes on "
                f"({names}); type it again when that has ended."
            )
        count = len(remove_snapshots(place / SNAPSHOTS))
    copies = "1 copy" if count == 1 else f"{count} copies"
    return f"{place / SNAPSHOTS}: {copies} of code deleted"


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())


def _may_need_code(folder: Path) -> bool:
    """Whether the job runs or will; where that cannot be told, it may."""
    try:
        launch, noted = read_launch(folder), read_job(folder)
        if launch is None or noted is None or read_outcome(folder) is not None:
            return False
        paths = RunPaths(as_path(noted["run"]))
        if launch.get("process") is not None:
            lives = lives_here(Owner(**launch["process"]))
            return is_held(paths.lock) if lives is None else lives
        if not launch["released"]:
            return True  # its scheduler may have it
        launcher = make_launcher(launch["launcher"], LAUNCHERS[launch["launcher"]]())
        name, command, sweep = folder.name, noted["command"], noted["sweep"]
        job = Job(name, command, cast(Config, None), (), paths, folder, sweep)
        handle = launcher.attach(job, launch)
        return handle is not None and handle.poll() is None
    except (OSError, LookupError, TypeError, ValueError, RuntimeError):
        return True
