"""Which runs a folder holds: a sweep's, all below an outputs folder or an address, or one.

Jobs that were handed to a launcher and have not begun count as well; nothing of a run is read here
but names.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from sdx.record.files import DamagedRecord
from sdx.record.paths import RunPaths
from sdx.record.store import AnyPath, as_path
from sdx_launchers.launch_record import LAUNCHES, SNAPSHOTS, SWEEPS, read_job
from sdx_launchers.sweep.folder import read_manifest
from sdx_launchers.sweep.objective import Objective, parse_objective

_REQUESTS_AT_ONCE = 16
_DEFAULT = Objective("validation_loss")


class NothingFound(ValueError):
    """A folder without any run, or with a damaged list of them; exit code 2."""


@dataclass(frozen=True)
class FoundRun:
    """A run by name; `launch` is the launching side's record of it, where this machine has one.

    `overrides` are what was typed for it, where a sweep or a launcher wrote that down.
    """

    name: str
    paths: RunPaths[Any]
    launch: Path | None = None
    overrides: tuple[str, ...] | None = None
    command: str = "train"


@dataclass(frozen=True)
class Found:
    """The runs at `place` in the order to be shown; `sweep` is the name of the sweep they are."""

    place: AnyPath
    runs: tuple[FoundRun, ...]
    sweep: str | None = None
    objective: Objective = _DEFAULT


def find(place: AnyPath) -> Found:
    """What lies at `place`; NothingFound says what a folder must be."""
    try:
        manifest = read_manifest(place) if isinstance(place, Path) else None
    except DamagedRecord as error:
        raise NothingFound(str(error)) from None
    if isinstance(place, Path) and manifest is not None:
        return _sweep(place, manifest)
    if _is_run(place):
        return Found(place, (_launched(place),))
    runs = tuple(_below(place))
    if not runs:
        raise NothingFound(
            f"{place}: holds no run and no sweep; give an outputs folder, outputs/sweeps/NAME, "
            "a run's folder, or the address of one in an object store."
        )
    return Found(place, runs)


def _sweep(folder: Path, manifest: Mapping[str, Any]) -> Found:
    try:
        runs = tuple(
            FoundRun(
                job["name"],
                RunPaths(as_path(job["run"])),
                Path(job["launch"]),
                tuple(job["overrides"]),
                manifest.get("command", "train"),
            )
            for job in manifest["jobs"]
        )
        objective = parse_objective(manifest.get("objective") or str(_DEFAULT))
    except (KeyError, TypeError) as error:
        raise NothingFound(f"{folder}: its sweep.json is not one of sdx ({error!r}).") from None
    return Found(
        folder, runs, folder.name, objective if isinstance(objective, Objective) else _DEFAULT
    )


def _is_run(place: AnyPath) -> bool:
    paths = RunPaths(place)
    return paths.run.is_file() or paths.status.is_file()


def _below(place: AnyPath) -> Iterator[FoundRun]:
    """Runs right below, then jobs whose runs would be there and are not."""
    folders = [path for path in _folders(place) if path.name not in (LAUNCHES, SWEEPS, SNAPSHOTS)]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        runs = list(compress(folders, pool.map(_is_run, folders)))
    yield from map(_launched, runs)
    names = {path.name for path in runs}
    for folder in _folders(_launches(place)):
        run = _launched(place / folder.name)
        if folder.name not in names and run.launch is not None:
            yield run


def _folders(place: AnyPath) -> list[Any]:
    if isinstance(place, Path) and not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if not path.name.startswith("."))


def _launches(place: AnyPath) -> Path:
    """Records of jobs are beside local runs, and in ./outputs for those of a store."""
    return (place if isinstance(place, Path) else Path("outputs").absolute()) / LAUNCHES


def _launched(root: Any) -> FoundRun:
    """The run at `root` with the record of its job, where there is one and it says so."""
    run = FoundRun(root.name, RunPaths(root))
    folder = _launches(root.parent) / root.name
    try:
        job = read_job(folder)
        if job is None or job["run"] != str(root):
            return run
        return replace(
            run, launch=folder, overrides=tuple(job["overrides"]), command=job["command"]
        )
    except (OSError, DamagedRecord, KeyError):
        return run
