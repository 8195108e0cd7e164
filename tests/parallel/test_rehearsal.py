"""`hardware.simulate=true` as a person meets it: one command, its processes, their end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.experiment.conftest import MICRO
from tests.processes import REPOSITORY

# Two of the four hosts, a chip each: what is asked here is how processes begin and end.
TARGET = (
    "hardware=tpu_v4_32", "hardware.simulate=true", "hardware.num_devices=2",
    "hardware.num_hosts=2", "hardware.topology=null", "train.per_device_batch_size=1",
    "run.name=run",
)  # fmt: skip


def begin(folder: Path, *overrides: str, command: str = "train") -> subprocess.Popen[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-m", f"sdx.{command}", *MICRO, *TARGET, *overrides],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children_of(pid: int) -> list[int]:
    """Processes that it started and that live."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def wait_for(folder: Path, text: str) -> None:
    """Returns once the run's log has it."""
    log, deadline = folder / "outputs" / "run" / "log.txt", time.monotonic() + 600
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(") ")[2][0] != "Z"


def test_ctrl_c_stops_all_hosts_after_a_step_and_the_record_says_what_it_was(
    tmp_path: Path,
) -> None:
    process = begin(tmp_path, "train.max_steps=5000", "sample.every=null")
    metrics = tmp_path / "outputs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    run = tmp_path / "outputs" / "run"
    status = json.loads((run / "status.json").read_text())
    record = json.loads((run / "run.json").read_text())
    assert status["status"] == "interrupted" and status["step"] >= 2
    assert record["simulated"] is True and len(record["devices"]) == 2
    assert record["overrides"] == [*MICRO, *TARGET, "train.max_steps=5000", "sample.every=null"]
    assert "process_id: null" in (run / "config.yaml").read_text()
    assert "2 processes for its hosts, 1 virtual CPU devices each" in output
    assert "2 x cpu that stand for hardware=tpu_v4_32 (simulated)" in output
    assert output.count("interrupted by") == 1 and "[Gloo]" not in output, output
    assert (run / "checkpoints" / str(status["step"])).is_dir()


def test_what_is_refused_is_said_once(tmp_path: Path) -> None:
    process = begin(tmp_path, "data=imagefolder", "data.dir=missing", "sample.every=null")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert output.count("missing") == 1, output
    assert not (tmp_path / "outputs").exists()


def test_hosts_die_with_the_command(tmp_path: Path) -> None:
    process = begin(tmp_path)
    assert process.stdout is not None
    while not (hosts := children_of(process.pid)) or len(hosts) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    while "tiny on shapes" not in process.stdout.readline():  # the headline: they have met
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=600)
    deadline = time.monotonic() + 600
    while any(is_alive(host) for host in hosts):
        assert time.monotonic() < deadline, hosts
        time.sleep(0.05)
