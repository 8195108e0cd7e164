"""The lock of a run folder: refused while its owner lives, taken when it is dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdx.record import lock as lock_module
from sdx.record.lock import RunLock, RunLocked, is_held

REPOSITORY = Path(__file__).resolve().parents[2]
_HOLD = """
import sys, time
from pathlib import Path
from sdx.record.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""
_RACE = """
import sys
from pathlib import Path
from sdx.record.lock import RunLock, RunLocked
sys.stdin.readline()
try:
    RunLock(Path(sys.argv[1])).acquire()
    print("won", flush=True)
except RunLocked:
    print("refused", flush=True)
sys.stdin.readline()
"""


def _begin(script: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _hold(path: Path) -> subprocess.Popen[str]:
    process = _begin(_HOLD, path)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock.json"


@pytest.mark.fast
def test_a_living_owner_is_named_and_a_killed_one_replaced_at_once(path: Path) -> None:
    owner = _hold(path)
    try:
        with pytest.raises(RunLocked) as refusal:
            RunLock(path).acquire()
        text = str(refusal.value)
        assert f"process {owner.pid} on {socket.gethostname()}" in text
        assert f"kill {owner.pid}" in text and "run.name" in text and str(path.parent) in text
        assert is_held(path)
        owner.send_signal(signal.SIGKILL)
        time.sleep(0.1)  # not waited for: a zombie is dead too
        assert not is_held(path)
        with RunLock(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    finally:
        _end(owner)


@pytest.mark.fast
def test_release_frees_it_and_leaves_a_lock_that_is_not_ours(path: Path) -> None:
    first = RunLock(path)
    first.acquire()
    with pytest.raises(RunLocked):
        RunLock(path).acquire()
    first.release()
    first.release()
    assert not path.exists() and not is_held(path)
    RunLock(path).release()
    with RunLock(path):
        first.release()
        assert is_held(path)


def _rewrite(path: Path, **fields: object) -> None:
    stat = path.stat()
    changed = path.with_name("changed")
    changed.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed.replace(path)


@pytest.mark.fast
def test_a_pid_given_to_another_process_is_dead(path: Path) -> None:
    owner = _hold(path)
    try:
        _rewrite(path, process_started=json.loads(path.read_text())["process_started"] - 1)
        assert not is_held(path)
    finally:
        _end(owner)


@pytest.mark.fast
@pytest.mark.parametrize("field", ["host", "machine"])
def test_elsewhere_the_lease_decides(path: Path, field: str) -> None:
    owner = _hold(path)
    _end(owner)
    _rewrite(path, **{field: "elsewhere"})
    assert is_held(path), "a pid of another machine says nothing here"
    with pytest.raises(RunLocked, match="60 s" if field == "host" else "kill"):
        RunLock(path).acquire()
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert not is_held(path)
    with RunLock(path):
        assert is_held(path)


@pytest.mark.fast
def test_the_heartbeat_renews_the_lease_and_notices_a_loss(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_HEARTBEAT_S", 0.02)
    lock = RunLock(path)
    lock.acquire()
    os.utime(path, (0, 0))
    time.sleep(0.2)
    assert path.stat().st_mtime > time.time() - 10
    assert not lock.lost
    _rewrite(path, owner="somebody else")
    time.sleep(0.2)
    assert lock.lost
    lock.release()
    assert path.exists(), "it is somebody else's"


def test_of_many_takers_of_a_dead_lock_one_wins(path: Path) -> None:
    _end(_hold(path))
    takers = [_begin(_RACE, path) for _ in range(6)]
    try:
        time.sleep(1)
        for taker in takers:
            assert taker.stdin is not None
            taker.stdin.write("go\n")
            taker.stdin.flush()
        said = sorted(taker.stdout.readline().strip() for taker in takers if taker.stdout)
    finally:
        for taker in takers:
            _end(taker)
    assert said == ["refused"] * 5 + ["won"]


def _outcomes(path: Path, num_takers: int) -> list[str]:
    """What becomes of takers that start within microseconds of each other."""
    barrier = threading.Barrier(num_takers)

    def take(lock: RunLock) -> str:
        barrier.wait()
        try:
            lock.acquire()
            return "won"
        except RunLocked:
            return "refused"

    locks = [RunLock(path) for _ in range(num_takers)]
    with ThreadPoolExecutor(num_takers) as pool:
        outcomes = list(pool.map(take, locks))
    for lock in locks:
        lock.release()
    return sorted(outcomes)


def test_threads_that_race_cannot_both_win(path: Path) -> None:
    for _ in range(20):
        assert _outcomes(path, 4) == ["refused"] * 3 + ["won"]


@pytest.mark.fast
def test_without_flock_the_last_writer_wins_and_the_others_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flock(descriptor: int, operation: int) -> None:
        raise OSError(lock_module.errno.ENOSYS, "not here")

    monkeypatch.setattr(lock_module.fcntl, "flock", no_flock)
    monkeypatch.setattr(lock_module, "_SETTLE_S", 0.1)
    monkeypatch.setattr(lock_module, "_is_alive", lambda holder, path: False)
    assert _outcomes(path, 3) == ["refused"] * 2 + ["won"]
