"""Asking git, which may be missing, hang, or know nothing of a folder: all of that is None."""

import os
import subprocess
from pathlib import Path

_TIMEOUT_S = 20


def git(folder: Path, *arguments: str, differs: bool = False) -> bytes | None:
    """What git prints, or None when it is missing, fails or hangs; `differs`: 1 is no failure."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0 and not (differs and done.returncode == 1):
        return None
    return done.stdout


def git_names(folder: Path, *arguments: str) -> list[str] | None:
    """The file names that `git ls-files` prints, whatever bytes they are made of."""
    listed = git(folder, "ls-files", "-z", *arguments)
    return None if listed is None else [os.fsdecode(name) for name in listed.split(b"\0") if name]


def work_tree(package: Path) -> Path | None:
    """The top of the work tree that tracks `package`; merely lying inside one does not count."""
    if git_names(package, "--error-unmatch", "__init__.py") is None:
        return None
    top = git(package, "rev-parse", "--show-toplevel")
    return Path(os.fsdecode(top).rstrip("\n")) if top else None
