"""Where a run came from: commit, uncommitted changes, package versions, Python, host, command line.

The environment's variables are never recorded: they hold secrets and say little. Without git, or
installed from a wheel, the git fields are None.
"""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).resolve().parents[1]  # the package sdx
_GIT_TIMEOUT_S = 20
_UNTRACKED = ("sdx", "conf", "launchers")  # below the top of the source tree
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


def git_commit(source: Path = _SOURCE) -> str | None:
    """The commit that `source` is checked out from, or None when git does not track it."""
    if _top(source) is None:
        return None
    return (_git(source, "rev-parse", "HEAD") or "").strip() or None


def weights_commit(record: Mapping[str, Any] | None, source: str) -> str | None:
    """The commit that the model's files had in the Hub repository `source`, by a run's record."""
    return _commit(record, "weights", source)


def data_commit(record: Mapping[str, Any] | None, source: str | None) -> str | None:
    """The commit that the dataset `source` of the Hub had, by a run's record."""
    return _commit(record, "data", source)


def _commit(record: Mapping[str, Any] | None, part: str, source: str | None) -> str | None:
    noted = (record or {}).get(part) or {}
    return noted.get("commit") if noted.get("source") == source else None


def uncommitted_changes(source: Path = _SOURCE) -> str | None:
    """A patch from the commit to the files on disk, new ones included; None if clean or no git."""
    top = _top(source)
    if top is None:
        return None
    patch = _git(top, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") or ""
    listed = _git(top, "ls-files", "-z", "--others", "--exclude-standard", "--", *_UNTRACKED) or ""
    for name in filter(None, listed.split("\0")):
        patch += _added(top, name)
        if len(patch) > _MAX_PATCH_CHARS:
            return patch[:_MAX_PATCH_CHARS] + "\n[cut off here: larger than sdx keeps]\n"
    return patch or None


def _added(top: Path, name: str) -> str:
    path = top / name
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MAX_FILE_BYTES:
        return f"# {name}: untracked, not included\n"
    # git diff --no-index exits 1 when the files differ, which here they always do
    return _git(top, "diff", "--no-index", "--no-color", "--", os.devnull, name, differs=True) or ""


def _top(source: Path) -> Path | None:
    """The top of the work tree that tracks `source`; merely lying inside one does not count."""
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    top = _git(source, "rev-parse", "--show-toplevel")
    return Path(top.rstrip("\n")) if top else None


def _git(folder: Path, *arguments: str, differs: bool = False) -> str | None:
    """What git prints, or None when it is missing, fails or hangs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0 and not (differs and done.returncode == 1):
        return None
    return done.stdout.decode("utf-8", errors="replace")
