"""A copy of the repository that commands run from, so that tests may change it meanwhile."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_COPIED = ("sdx", "conf", "launchers", "pyproject.toml")
_PLANTED = "\nfrom sdx.training import faults  # noqa: E402,F401\n"


@dataclass(frozen=True)
class SourceTree:
    """A checkout at `folder`, with faults.py planted but not committed."""

    folder: Path

    def start(
        self, command: str, *arguments: str, where: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`python -m sdx.COMMAND ARGUMENTS` in the folder `where`; its output is one text."""
        path = os.pathsep.join([str(self.folder), str(self.folder / "launchers")])
        given = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}
        where.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", f"sdx.{command}", *arguments],
            cwd=where,
            env=os.environ | given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )


def copy_source(folder: Path) -> SourceTree:
    """The repository as it lies there, committed, with faults planted on top."""
    for name in _COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    git = ["git", "-C", str(folder), "-c", "user.name=sdx", "-c", "user.email=sdx@localhost"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "as it is"]):
        subprocess.run([*git, *arguments], check=True)
    shutil.copy(Path(__file__).with_name("faults.py"), folder / "sdx" / "training" / "faults.py")
    with (folder / "sdx" / "training" / "program.py").open("a") as file:
        file.write(_PLANTED)
    return SourceTree(folder)
