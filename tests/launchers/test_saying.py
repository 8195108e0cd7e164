"""Where nobody listens any more, the work goes on and no traceback is its end."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdx.record.status import Status
from sdx_launchers.jobs import Ended
from sdx_launchers.local.launcher import _Child
from sdx_launchers.saying import say
from tests.launchers.made_runs import make_job, make_run

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


def test_a_job_whose_words_nobody_reads_ends_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, pipe = os.pipe()
    os.close(end)
    with os.fdopen(pipe, "w") as nobody, subprocess.Popen(["false"]) as process:
        process.wait()
        log = tmp_path / "log.txt"
        log.write_text("step 1\n")
        child = _Child(make_job(tmp_path, "one"), process, 0, log, 0, speaks=True)
        monkeypatch.setattr(sys, "stdout", nobody)
        ended = child.poll()
    assert ended == Ended(Status.failed, "exit code 1: step 1")


def test_letters_that_a_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    say("50 % \u2588")
    assert terminal.buffer.getvalue() == b"50 % ?\n"  # type: ignore[attr-defined]


def test_a_sweep_that_nobody_reads_ends_with_its_own_code(tmp_path: Path) -> None:
    dry = ["-m", "sdx.train", "--multirun", "run.seed=0,1", "hydra.sweeper.dry_run=true"]
    assert unheard(tmp_path, *dry) == (0, "")
