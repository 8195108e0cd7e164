"""Where nobody listens any more, the work goes on and no traceback is its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.made_runs import make_run

pytestmark = pytest.mark.fast


def unheard(folder: Path, *argv: str) -> tuple[int, str]:
    """Exit code and errors of a command whose output goes to a pipe that nobody reads."""
    end, pipe = os.pipe()
    os.close(end)
    with os.fdopen(pipe, "wb") as out:
        done = subprocess.run(
            [sys.executable, *argv], cwd=folder, stdout=out, stderr=subprocess.PIPE, text=True
        )
    return done.returncode, done.stderr


def test_a_table_that_nobody_reads(tmp_path: Path) -> None:
    make_run(tmp_path / "outputs", "one")
    assert unheard(tmp_path, "-m", "sdx.runs") == (0, "")


def test_a_sweep_that_nobody_reads_ends_with_its_own_code(tmp_path: Path) -> None:
    dry = ["-m", "sdx.train", "--multirun", "run.seed=0,1", "hydra.sweeper.dry_run=true"]
    assert unheard(tmp_path, *dry) == (0, "")
