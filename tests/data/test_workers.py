"""What is said when reading hangs, a loader process dies or raises: in real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sdx.data.source import DataError, Example
from sdx.data.workers import _obituary
from tests.data.test_loader import DATA, Numbered, loader


@dataclass(frozen=True)
class Stuck(Numbered):
    """Example 7 is never read; the source of a mount that does not answer."""

    def __getitem__(self, index: int) -> Example:
        if index == 7:
            wait_for_the_server()
        return super().__getitem__(index)


@dataclass(frozen=True)
class Deadly(Numbered):
    """Reading example 7 kills the process, as the kernel does where memory runs out."""

    def __getitem__(self, index: int) -> Example:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@dataclass(frozen=True)
class Crashing(Numbered):
    """Reading example 7 crashes in C code."""

    def __getitem__(self, index: int) -> Example:
        if index == 7:
            signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)
        return super().__getitem__(index)


def wait_for_the_server() -> None:
    time.sleep(1000)


IN_ORDER = replace(DATA, shuffle=False)


@pytest.mark.fast
def test_a_source_that_hangs_is_an_error_with_its_stack():
    data = replace(IN_ORDER, worker_timeout_s=0.2)
    with loader(Stuck(), data) as batches:
        assert next(batches).indices.tolist() == [0, 1, 2, 3]
        with pytest.raises(DataError, match=r"worker_timeout_s=0\.2: no batch for step 1") as error:
            next(batches)
        assert "in wait_for_the_server" in str(error.value)


def test_hung_and_dead_processes_are_errors_that_say_so(tmp_path: Path):
    """One trainer, four loaders one after the other: each costs the start of its processes."""
    result = play(tmp_path, "processes")
    assert result.returncode == 0, result.stderr
    hung, stopped, killed, crashed, _ = result.stdout.split("=====")
    assert "data.worker_timeout_s=60: no batch for step 1" in hung
    assert "in wait_for_the_server" in hung
    assert "does not answer; it is T (stopped)" in stopped
    assert "exit code -9 (signal SIGKILL" in killed and "fewer data.num_workers" in killed
    assert "exit code -11 (signal SIGSEGV)" in crashed
    assert "in __getitem__" in crashed and "test_workers.py" in crashed


@pytest.mark.fast
def test_a_trainer_whose_thread_hangs_ends(tmp_path: Path):
    """The thread that is stuck does not keep the process alive after the error was shown."""
    result = play(tmp_path, "thread")
    assert result.returncode == 1
    assert "DataError: data.worker_timeout_s=0.2" in result.stderr


@pytest.mark.fast
def test_exit_codes_above_zero_are_the_processes_own():
    assert "exit code 1 (what it wrote is above)" in _obituary(1, "")


SCRIPT = """
import multiprocessing, os, signal, sys
from dataclasses import replace
from itertools import islice
from sdx.data.source import DataError
from tests.data.test_loader import Numbered, loader
from tests.data.test_workers import IN_ORDER, Crashing, Deadly, Stuck

def say(source, data, stop=False, timeout_s=60):
    with loader(source, data) as batches:
        try:
            next(batches)
            batches._batches._batches._timeout_s = timeout_s  # the first may take long to come
            for child in multiprocessing.active_children() if stop else ():
                os.kill(child.pid, signal.SIGSTOP)
            list(islice(batches, 9))
        except DataError as error:
            print(error, "=====", flush=True)

def main():
    data = replace(IN_ORDER, num_workers=1, worker_timeout_s=60)
    say(Stuck(), replace(data, num_workers=2), timeout_s=1)
    say(Numbered(), data, stop=True, timeout_s=1)
    say(Deadly(), data)
    say(Crashing(), data)
    assert not multiprocessing.active_children()

if __name__ == "__main__":
    if sys.argv[1] == "thread":
        list(islice(loader(Stuck(), replace(IN_ORDER, worker_timeout_s=0.2)), 9))
    main()
"""


def play(folder: Path, part: str) -> "subprocess.CompletedProcess[str]":
    script = folder / "trainer.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, str(script), part],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
    )
