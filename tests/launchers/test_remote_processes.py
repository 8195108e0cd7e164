"""How a job ended by what its supervisors could say, without workers."""

import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pytest

from sdx.config.launching import TpuSettings
from sdx_launchers.tpu import remote_processes
from sdx_launchers.tpu.remote_processes import RemoteEnd, RemoteProcess, RemoteProcesses
from sdx_launchers.tpu.ssh import Host
from sdx_launchers.tpu.workers import Worker, Workers

pytestmark = pytest.mark.fast

TOKEN = "sdx-ended-0123"
DEADLINE_S = 300.0


def process(folder: Path, said: str, code: int = 255) -> RemoteProcess:
    """Of a worker whose ssh wrote `said` and ended with `code`."""
    log, said_by_ssh = folder / "worker-0.log", folder / "worker-0.ssh"
    log.write_text("")
    said_by_ssh.write_text(said)
    exits = [sys.executable, "-S", "-c", f"import os; os._exit({code})"]
    client = subprocess.Popen(exits, stdin=subprocess.PIPE)
    return RemoteProcess(Host("node", 0, "10.0.0.1"), client, TOKEN, log, said_by_ssh, 0)


def end_of(one: RemoteProcess) -> RemoteEnd:
    processes = RemoteProcesses([one], speaks=False, sign_every_s=60.0)
    deadline = time.monotonic() + DEADLINE_S
    while (end := processes.poll()) is None:
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.01)
    return end


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_processes, "_LOOK_EVERY_S", 0.01)


@pytest.mark.parametrize("last", ["", " ", " \n", " 13", " -", " x\n"])
def test_a_report_that_was_cut_off_is_none(tmp_path: Path, last: str) -> None:
    end = end_of(process(tmp_path, f"\n{TOKEN}{last}"))
    assert end.code is None and "the connection was lost" in str(end.reason)


@pytest.mark.parametrize("code", [0, 75, 3, -9])
def test_a_whole_report_counts_whatever_follows_it(tmp_path: Path, code: int) -> None:
    end = end_of(process(tmp_path, f"warning\n{TOKEN} {code}\nConnection closed.\n"))
    assert end.code == code


def test_what_goes_wrong_in_watching_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: RemoteProcess) -> bool:
        raise ZeroDivisionError("oops")

    one = process(tmp_path, "")
    monkeypatch.setattr(RemoteProcess, "look", broken)
    end = end_of(one)
    assert end.code is None and "ZeroDivisionError: oops" in str(end.reason)
    one.client.wait()
    assert one.client.stdin is not None
    one.client.stdin.close()


def test_a_worker_is_sent_its_supervisor_and_then_its_order(tmp_path: Path) -> None:
    got, host = tmp_path / "got", Host("node", 0, "10.0.0.1")
    settings = TpuSettings(ssh_command=["sh", "-c", f"cat > '{got}'", "{command}"])
    worker = Worker(host, PurePosixPath("/home/me/sdx"), "python", ())
    one = Workers([host], settings, tmp_path)._start(worker, 0, {"token": TOKEN})
    assert one.client.stdin is not None
    one.client.stdin.close()
    assert one.client.wait() == 0
    source = Path(remote_processes.__file__).with_name("supervise.py").read_text()
    assert got.read_text() == f'{len(source.encode())}\n{source}{{"token": "{TOKEN}"}}\n'
