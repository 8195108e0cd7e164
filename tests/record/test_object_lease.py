"""The lock in a store: one of many gets it, a dead owner's is taken, a lost one is noticed."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest

from sdx.record import lock as lock_module
from sdx.record import object_lease
from sdx.record.lock import RunLock, RunLocked, is_held
from sdx.record.store import ObjectPath, as_path
from tests.record.test_lock import _HOLD, _begin, _end

HOLD = _HOLD.replace("from pathlib import Path", "from sdx.record.store import as_path as Path")


@pytest.fixture
def path(bucket: str) -> ObjectPath:
    path = as_path(f"{bucket}/run/lock.json")
    assert isinstance(path, ObjectPath)
    return path


def locks(path: ObjectPath) -> list[ObjectPath]:
    return list((path.parent / "lock").iterdir())


@pytest.fixture
def owner(path: ObjectPath) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = _begin(HOLD, path)  # type: ignore[arg-type]
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_living_owner_is_named_and_a_killed_one_replaced_at_once(
    path: ObjectPath, owner: subprocess.Popen[str]
) -> None:
    try:
        with pytest.raises(RunLocked, match=f"{path.parent}: in use by process {owner.pid} on"):
            RunLock(path).acquire()
        assert is_held(path)
        owner.send_signal(signal.SIGKILL)
        time.sleep(0.1)
        assert not is_held(path)
        with RunLock(path):
            assert [json.loads(lock.read_text())["pid"] for lock in locks(path)] == [os.getpid()]
        assert locks(path) == []
    finally:
        _end(owner)


def test_elsewhere_the_lease_decides(path: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RunLock(path)
    record = {**asdict(other._owner), "host": "elsewhere"}
    lock = path.parent / "lock" / "000007.json"
    lock.write_bytes(json.dumps(record).encode())
    assert is_held(path)
    with pytest.raises(RunLocked, match="on elsewhere .* 60 s"):
        RunLock(path).acquire()
    put = lock.modified()
    monkeypatch.setattr(
        ObjectPath, "modified", lambda self: put + (0 if self == lock else object_lease.LEASE_S + 1)
    )
    assert not is_held(path)
    with RunLock(path):
        assert [lock.name for lock in locks(path)] == ["000008.json"]


def test_of_many_that_start_one_wins(path: ObjectPath) -> None:
    dead = RunLock(path)
    (path.parent / "lock" / "000003.json").write_bytes(
        json.dumps({**asdict(dead._owner), "pid": 2**22 + 1}).encode()
    )

    def take(_: int) -> RunLock | None:
        lock = RunLock(path)
        try:
            lock.acquire()
        except RunLocked:
            return None
        return lock

    with ThreadPoolExecutor(6) as pool:
        winners = [lock for lock in pool.map(take, range(6)) if lock is not None]
    assert len(winners) == 1 and len(locks(path)) == 1
    winners[0].release()
    assert locks(path) == []


def test_a_number_that_came_free_is_looked_at_again(
    path: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow starter creates a number above those it saw long ago; meanwhile it began anew at 1."""
    slow, quick = RunLock(path), RunLock(path)
    real, seen = object_lease._locks, []

    def stale(folder: ObjectPath) -> list[ObjectPath]:
        if not seen:
            seen.append(True)
            quick.acquire()
            return [folder / "000005.json"]
        return real(folder)

    monkeypatch.setattr(object_lease, "_locks", stale)
    with pytest.raises(RunLocked):
        slow._lease.claim()
    assert [lock.name for lock in locks(path)] == ["000001.json"]
    quick.release()


@pytest.mark.parametrize("taken", [[], ["000002.json"]])
def test_a_lock_that_was_taken_away_is_lost(path: ObjectPath, taken: list[str]) -> None:
    lock = RunLock(path)
    lock.acquire()
    (mine,) = locks(path)
    put = mine.read_bytes()
    assert lock._lease.renew() and locks(path) == [mine]
    mine.unlink()
    for name in taken:
        mine.with_name(name).write_bytes(put)
    assert not lock._lease.renew()
    assert [entry.name for entry in locks(path)] == taken
    lock.release()


def test_the_heartbeat_notices_who_took_over(
    path: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_HEARTBEAT_S", 0.02)
    lock = RunLock(path)
    lock.acquire()
    (mine,) = locks(path)
    mine.with_name("000002.json").write_bytes(b"{}")  # asleep meanwhile: our own is still there
    deadline = time.monotonic() + 300
    while not lock.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.lost and not mine.exists()
    lock.release()


def test_without_conditional_puts_the_one_overwritten_gives_way(
    path: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it can see: see `object_lease`."""
    other = json.dumps({**asdict(RunLock(path)._owner), "host": "elsewhere"}).encode()
    monkeypatch.setattr(
        ObjectPath,
        "create",
        lambda self, content: (self.write_bytes(content), self.write_bytes(other)),
    )
    with pytest.raises(RunLocked, match="elsewhere"):
        RunLock(path).acquire()
    assert is_held(path)
