"""Two real processes: signals and errors of one end both, at the same step or with its reason."""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.experiment.conftest import MICRO
from tests.processes import Ended, Processes, started

LOOP = ["-m", "tests.parallel.loop"]
NO_STACK = "Check failure stack trace"  # of C++, which would bury the reason


@contextmanager
def looping(*options: str, num_ready: int = 2) -> Iterator[Processes]:
    """Two processes in the middle of their steps."""
    with started([*LOOP, *options]) as processes:
        for number in range(num_ready):
            processes.wait_until_said(number, "ready")
        yield processes


def ended(processes: Processes) -> Ended:
    """Both, each by itself: JAX's own end, ten minutes later, would be a kill with exit code -9."""
    return processes.end(300)


@pytest.mark.parametrize(("number", "sent"), [(1, signal.SIGTERM), (0, signal.SIGUSR2)])
def test_a_signal_to_one_stops_both_before_the_same_step(number: int, sent: signal.Signals) -> None:
    with looping() as processes:
        processes.send(number, sent)
        result = ended(processes)
    assert result.codes == [75, 75], result
    stopped = [text.partition("stopped before ")[2].split("\n")[0] for text in result.outputs]
    assert stopped[0].startswith("step ") and stopped[0] == stopped[1], result
    assert f"{sent.name}: stopped" in result.outputs[number], result
    assert NO_STACK not in str(result)
    assert "[Gloo]" not in str(result)


def test_a_signal_while_one_compiles_ends_both_at_once() -> None:
    with looping("compile=1") as processes:
        processes.wait_until_said(1, "compiling")
        processes.send(0, signal.SIGTERM)  # which waits for the other in a collective
        result = ended(processes)
    assert result.codes == [75, 75], result
    assert "interrupted" in result.outputs[0], result


def test_an_error_of_one_ends_both_with_its_traceback() -> None:
    with started([*LOOP, "raise=1@5"]) as processes:
        processes.wait_until_said(0, "ready")
        result = ended(processes)
    assert result.codes == [1, 1], result
    first = result.outputs[0]
    assert "in steps\n    raise OSError" in first, result
    assert "failed: process 1 of 2 on " in first and "OSError: the disk is gone" in first, result
    assert "the disk is gone" in result.outputs[1], result
    assert NO_STACK not in str(result)


def test_an_error_of_the_first_ends_both() -> None:
    with started([*LOOP, "raise=0@5"]) as processes:
        processes.wait_until_said(1, "ready")
        result = ended(processes)
    assert result.codes == [1, 1], result
    assert "failed: OSError: the disk is gone" in result.outputs[0], result
    assert "ended with the whole run: OSError: the disk is gone" in result.outputs[1], result


# sdx.train whose second process cannot read weights, while the first may be compiling.
PATIENT = "distributed.heartbeat_timeout_s=600"
BROKEN_TRAIN = """
import sys
from sdx.experiment.attempt import Attempt
from sdx.train import main
def broken(attempt):
    raise OSError("the disk is gone")
if "distributed.process_id=1" in sys.argv:
    Attempt._compile = broken
sys.exit(main())
"""


def test_the_record_of_a_run_has_the_traceback_of_the_process_that_failed(tmp_path: Path) -> None:
    overrides = (*MICRO, "hardware.num_devices=2", "mesh=dp", "run.name=run", PATIENT)
    with started(["-c", BROKEN_TRAIN, *overrides], folder=tmp_path) as processes:
        processes.wait_until_said(0, "tiny on shapes")
        result = ended(processes)
    assert result.codes == [1, 1], result
    run = tmp_path / "outputs" / "run"
    log, status = (run / "log.txt").read_text(), json.loads((run / "status.json").read_text())
    assert "in broken\n" in log and "OSError: the disk is gone" in log
    assert status["status"] == "failed"
    assert re.fullmatch(r"process 1 of 2 on \S+: OSError: the disk is gone", status["reason"])
    assert status["reason"] in log and status["reason"] in result.outputs[0]
    assert not (run / "lock.json").exists() and "Check failure" not in str(result)


def test_the_death_of_one_ends_the_other_within_the_heartbeat() -> None:
    with looping("heartbeat=5") as processes:
        processes.send(1, signal.SIGKILL)
        result = ended(processes)
    assert result.codes == [1, -signal.SIGKILL], result
    assert "failed: process 1 of 2 on " in result.outputs[0], result
    assert "no sign of life for 4 s" in result.outputs[0], result
    assert NO_STACK not in str(result)


def test_the_death_of_the_first_ends_the_other_at_once() -> None:
    with looping() as processes:
        processes.send(0, signal.SIGKILL)
        result = ended(processes)
    assert result.codes[0] == -signal.SIGKILL, result
    assert result.codes[1] not in (0, 75, -signal.SIGKILL), result


def test_a_process_that_does_not_come_is_told_of() -> None:
    with started([*LOOP, "initialization=2"], num_processes=2) as processes:
        processes.running[1].kill()
        result = ended(processes)
    assert result.codes[0] == 1, result
    assert "sdx: process 0 of 2 waited 2 s" in result.outputs[0], result
    assert NO_STACK not in result.outputs[0]
