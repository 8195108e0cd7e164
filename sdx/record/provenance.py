"""Where a run came from: commit, uncommitted changes, package versions, Python, host, command line.

The environment's variables are never recorded: they hold secrets and say little. Without git, or
installed from a wheel, the git fields are None. Code that runs from a snapshot (see `snapshot`)
came from where the snapshot was taken.
"""

import os
import platform
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sdx.record.files import read_json
from sdx.record.git import git, git_names, work_tree

PACKAGE = Path(__file__).resolve().parents[1]  # sdx
UNTRACKED = ("sdx", "conf", "launchers")
"""Folders at the top of the source tree whose untracked files belong to it."""
SNAPSHOT_RECORD = "snapshot.json"
"""Beside the package sdx of a snapshot: what it was taken from."""
_MAX_FILE_BYTES = 1 << 20
_MAX_PATCH_CHARS = 10_000_000


def provenance() -> dict[str, Any]:
    """What `run.json` says about the program that ran; see also `uncommitted_changes`."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "argv": list(sys.argv),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Every installed distribution and its version, by name."""
    found = {
        distribution.metadata["Name"]: distribution.version
        for distribution in metadata.distributions()
        if distribution.metadata["Name"]
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def git_commit(package: Path = PACKAGE) -> str | None:
    """The commit that `package` is checked out from, or None when git does not track it."""
    taken = read_json(package.parent / SNAPSHOT_RECORD)
    if taken is not None:
        return taken["commit"]
    if work_tree(package) is None:
        return None
    return _text(package, "rev-parse", "HEAD").strip() or None


def weights_commit(record: Mapping[str, Any] | None, source: str) -> str | None:
    """The commit that the model's files had in the Hub repository `source`, by a run's record."""
    return _commit(record, "weights", source)


def data_commit(record: Mapping[str, Any] | None, source: str | None) -> str | None:
    """The commit that the dataset `source` of the Hub had, by a run's record."""
    return _commit(record, "data", source)


def _commit(record: Mapping[str, Any] | None, part: str, source: str | None) -> str | None:
    noted = (record or {}).get(part) or {}
    return noted.get("commit") if noted.get("source") == source else None


def uncommitted_changes(package: Path = PACKAGE) -> str | None:
    """A patch from the commit to the files on disk, new ones included; None if clean or no git."""
    taken = read_json(package.parent / SNAPSHOT_RECORD)
    if taken is not None:
        return taken["patch"]
    top = work_tree(package)
    if top is None:
        return None
    patch = _text(top, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    for name in git_names(top, "--others", "--exclude-standard", "--", *UNTRACKED) or ():
        patch += _added(top, name)
        if len(patch) > _MAX_PATCH_CHARS:
            return patch[:_MAX_PATCH_CHARS] + "\n[cut off here: larger than sdx keeps]\n"
    return patch or None


def _added(top: Path, name: str) -> str:
    path = top / name
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MAX_FILE_BYTES:
        readable = os.fsencode(name).decode("utf-8", errors="replace")
        return f"# {readable}: untracked, not included\n"
    # git diff --no-index exits 1 when the files differ, which here they always do
    return _text(top, "diff", "--no-index", "--no-color", "--", os.devnull, name, differs=True)


def _text(folder: Path, *arguments: str, differs: bool = False) -> str:
    """What git prints, "" where it prints nothing or fails."""
    return (git(folder, *arguments, differs=differs) or b"").decode("utf-8", errors="replace")
