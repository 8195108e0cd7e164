"""TPUs that are asked for, used, lost and deleted, against a stand-in of Google's API."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sdx.record.lock import RunLock, is_held
from sdx.record.status import Status
from sdx_launchers.jobs import Ended, Handle
from sdx_launchers.tpu import pool as tpu_pool
from sdx_launchers.tpu import run as tpu_run
from sdx_launchers.tpu.ledger import Ledger
from sdx_launchers.tpu.remote_processes import RemoteEnd
from sdx_launchers.tpu.strays import sweep_up
from sdx_launchers.tpu.workers import ConnectionLost
from tests.launchers.tpu_jobs import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    LOST,
    Script,
    launching,
    make_job,
    make_settings,
    tpu_config,
)
from tests.launchers.tpu_server import QUEUE, TpuServer, serving

_WITHIN_S = 300.0
NO_CAPACITY = 'There is no more capacity in the zone "us-central2-b"'
NO_QUOTA = "Quota limit 'TPUV4sPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in region us"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A ledger of the test's own, and no code to copy."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(tpu_pool, "_SETTLE_S", 0.1)
    monkeypatch.setattr("sdx_launchers.tpu.launcher.take_snapshot", lambda folder: None)


@pytest.fixture
def server() -> TpuServer:
    return TpuServer(step_s=0.02)


@pytest.fixture
def endpoint(server: TpuServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end_of(handle: Handle) -> Ended:
    eventually(lambda: handle.poll() is not None)
    ended = handle.poll()
    assert ended is not None
    return ended


def ends(endpoint: str, root: Path, script: Script, jobs: str = "a", **more: Any) -> list[Ended]:
    """How jobs end that are started together, and nothing is left of them."""
    settings = make_settings(endpoint, root, **more)
    with launching(settings, script) as launcher:
        handles = launcher.start([make_job(root, name) for name in jobs], None)
        return [end_of(handle) for handle in handles]


def creations(server: TpuServer) -> list[str]:
    return [
        request.queued_resource_id
        for name, request in server.calls
        if name == "CreateQueuedResource"
    ]


def test_a_tpu_is_asked_for_used_and_deleted(
    server: TpuServer, endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The person sees where in the queue it is."""
    script, said = Script(), ""
    server.queue = QUEUE[:3]
    with launching(make_settings(endpoint, tmp_path), script) as launcher:
        [handle] = launcher.start([make_job(tmp_path)], None)
        while "WAITING_FOR_RESOURCES" not in said:
            assert handle.poll() is None
            said += capfd.readouterr().err
        server.go_on()
        assert end_of(handle) == Ended(Status.finished)
    [name] = creations(server)
    assert name.startswith("sdx-ann-")
    assert [host.address for host in script.hosts[0]] == list(server.addresses)
    assert server.names() == [] and Ledger().entries() == []
    said += capfd.readouterr().err
    assert f"{name}: WAITING_FOR_RESOURCES" in said and f"{name}: deleted" in said


def test_its_name_is_on_the_ledger_before_it_is_asked_for(
    server: TpuServer, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[list[str]] = []
    create = server.CreateQueuedResource

    def see(request: object) -> object:
        noted.append([entry.name for entry in Ledger().entries()])
        return create(request)

    monkeypatch.setattr(server, "CreateQueuedResource", see)
    ends(endpoint, tmp_path, Script())
    assert noted == [creations(server)]


def test_no_capacity_is_waited_for(server: TpuServer, endpoint: str, tmp_path: Path) -> None:
    server.fail(8, NO_CAPACITY)
    server.refuse("CreateQueuedResource", grpc.StatusCode.RESOURCE_EXHAUSTED, NO_CAPACITY)
    assert ends(endpoint, tmp_path, Script()) == [Ended(Status.finished)]
    assert len(set(creations(server))) == 3
    assert server.names() == []


@pytest.mark.parametrize("at_once", [True, False])
def test_a_quota_is_not_waited_for(
    server: TpuServer, endpoint: str, tmp_path: Path, at_once: bool
) -> None:
    if at_once:
        server.refuse("CreateQueuedResource", grpc.StatusCode.RESOURCE_EXHAUSTED, NO_QUOTA)
    else:
        server.fail(8, NO_QUOTA)
    [ended] = ends(endpoint, tmp_path, Script())
    assert ended.status is Status.failed
    assert ended.reason is not None and "TPUV4sPerProject" in ended.reason
    assert "iam-admin/quotas" in ended.reason
    assert len(creations(server)) == 1 and server.names() == []


def test_missing_rights_are_said(server: TpuServer, endpoint: str, tmp_path: Path) -> None:
    server.refuse("CreateQueuedResource", grpc.StatusCode.PERMISSION_DENIED, "tpu.nodes.create")
    [ended] = ends(endpoint, tmp_path, Script())
    assert ended.status is Status.failed
    assert ended.reason is not None and "roles/tpu.admin" in ended.reason


def test_an_api_that_is_away_is_asked_again(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    for method in ("CreateQueuedResource", "GetQueuedResource", "UpdateNode", "GetOperation"):
        server.refuse(method, grpc.StatusCode.UNAVAILABLE, "away", times=2)
    server.refuse("DeleteQueuedResource", grpc.StatusCode.UNAVAILABLE, "away", times=2)
    server.refuse("DeleteQueuedResource", grpc.StatusCode.FAILED_PRECONDITION, "busy", times=2)
    server.refuse("GetNode", grpc.StatusCode.RESOURCE_EXHAUSTED, "60 requests per minute")
    assert ends(endpoint, tmp_path, Script()) == [Ended(Status.finished)]
    assert server.names() == []


def test_a_tpu_that_does_not_come_in_time_is_deleted(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    server.queue, server.step_s = QUEUE[:3], 0.001
    [ended] = ends(endpoint, tmp_path, Script(), startup_timeout_min=0.005)
    assert ended.status is Status.failed and ended.reason is not None
    assert "startup_timeout_min=0.005" in ended.reason
    assert "WAITING_FOR_RESOURCES" in ended.reason
    assert server.names() == [] and Ledger().entries() == []


def test_one_that_comes_with_other_workers_is_not_used(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    server.addresses = server.addresses[:2]
    [ended] = ends(endpoint, tmp_path, Script())
    assert ended.status is Status.failed
    assert ended.reason is not None and "came with 2 workers" in ended.reason


@pytest.mark.parametrize("node_state", ["PREEMPTED", "TERMINATED"])
@pytest.mark.parametrize("last", [None, INTERRUPTED, LOST, FAILED])
def test_a_preempted_job_goes_on_with_another_tpu(
    server: TpuServer, endpoint: str, tmp_path: Path, node_state: str, last: RemoteEnd | None
) -> None:
    """Whatever its processes said at last."""

    def preempted() -> RemoteEnd | None:
        server.preempt(creations(server)[0], node_state)
        return last

    script = Script(ends=[preempted, FINISHED])
    assert ends(endpoint, tmp_path, script) == [Ended(Status.finished)]
    first, second = creations(server)
    assert [hosts[0].node for hosts in script.hosts] == [first, second]
    deleted = [request.name for name, request in server.calls if name == "DeleteQueuedResource"]
    assert deleted[0].endswith(first)
    assert server.names() == []


def test_the_same_job_goes_on_only_when_nothing_holds_its_run(
    server: TpuServer, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the processes on the lost TPU live on for a while."""
    job = make_job(tmp_path)
    job.paths.root.mkdir()
    lock = RunLock(job.paths.lock)
    order: list[str] = []

    def held(path: Path) -> bool:
        order.append("asked")
        if order[-3:] == ["asked"] * 3:
            lock.release()
        return is_held(path)

    def preempted() -> None:
        if "lost" not in order:
            lock.acquire()
            order.append("lost")
        server.preempt(creations(server)[0])

    def finished() -> RemoteEnd:
        assert not is_held(job.paths.lock)
        order.append("on")
        return FINISHED

    monkeypatch.setattr(tpu_run, "is_held", held)
    with launching(make_settings(endpoint, tmp_path), Script(ends=[preempted, finished])) as tpus:
        [handle] = tpus.start([job], None)
        assert end_of(handle).status is Status.finished
    assert order == ["asked", "lost", "asked", "asked", "asked", "on"]


def test_a_job_that_loses_every_tpu_is_interrupted(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    def preempted() -> None:
        server.preempt(creations(server)[-1])

    [ended] = ends(endpoint, tmp_path, Script(ends=[preempted, preempted, preempted]), retries=1)
    assert ended.status is Status.interrupted
    assert ended.reason is not None and "lost its TPU 2 times" in ended.reason
    assert len(creations(server)) == 2 and server.names() == []


def test_a_job_that_fails_by_itself_is_not_tried_again(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    script = Script(ends=[FAILED])
    assert ends(endpoint, tmp_path, script) == [Ended(Status.failed, FAILED.reason)]
    assert len(script.hosts) == 1


def test_one_that_was_asked_to_stop_is_interrupted(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    assert ends(endpoint, tmp_path, Script(ends=[INTERRUPTED])) == [Ended(Status.interrupted)]


def test_a_lost_connection_to_a_living_tpu_does_not_cost_the_tpu(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    script = Script(ends=[LOST, FINISHED])
    assert ends(endpoint, tmp_path, script) == [Ended(Status.finished)]
    assert len(script.hosts) == 2 and len(creations(server)) == 1


def test_a_tpu_that_was_lost_between_jobs_is_not_used(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    script = Script()
    with launching(make_settings(endpoint, tmp_path), script) as launcher:
        [first] = launcher.start([make_job(tmp_path, "a")], None)
        end_of(first)
        server.preempt(creations(server)[0])
        [second] = launcher.start([make_job(tmp_path, "b")], None)
        assert end_of(second).status is Status.finished
    assert [hosts[0].node for hosts in script.hosts] == creations(server)
    assert len(creations(server)) == 2 and server.names() == []


@pytest.mark.parametrize("is_lost", [True, False])
def test_workers_that_do_not_answer_are_a_loss_only_if_their_tpu_is_gone(
    server: TpuServer, endpoint: str, tmp_path: Path, is_lost: bool
) -> None:
    """Else the way to them is wrong, and another TPU would not help."""

    def prepare() -> None:
        if len(creations(server)) == 1:
            if is_lost:
                server.preempt(creations(server)[0])
            raise ConnectionLost("worker 0: no answer")

    [ended] = ends(endpoint, tmp_path, Script(prepare=prepare))
    assert ended.status is (Status.finished if is_lost else Status.failed)
    assert is_lost or ended.reason == "worker 0: no answer"
    assert len(creations(server)) == (2 if is_lost else 1) and server.names() == []


def test_a_sweep_uses_one_tpu_for_job_after_job(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    script = Script(ends=[FAILED])
    statuses = [ended.status for ended in ends(endpoint, tmp_path, script, jobs="abc")]
    assert sorted(status.name for status in statuses) == ["failed", "finished", "finished"]
    assert len(script.hosts) == 3 and len(creations(server)) == 1


def test_the_pool_grows_with_jobs_up_to_max_parallel(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    go = threading.Event()
    wait = [lambda: FINISHED if go.is_set() else None] * 3
    script = Script(ends=[*wait])
    with launching(make_settings(endpoint, tmp_path), script) as launcher:
        [first] = launcher.start([make_job(tmp_path, "a")], 2)
        eventually(lambda: len(script.hosts) == 1)
        assert len(server.names()) == 1
        more = launcher.start([make_job(tmp_path, name) for name in "bc"], 2)
        eventually(lambda: len(script.hosts) == 2)
        assert len(server.names("ACTIVE")) == 2
        go.set()
        assert {end_of(handle).status for handle in (first, *more)} == {Status.finished}
    assert len(creations(server)) == 2 and server.names() == []


def test_several_slices_are_one_job_in_the_order_of_their_numbers(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    script = Script()
    config = tpu_config("hardware=tpu_v4_32x2")
    with launching(make_settings(endpoint, tmp_path), script) as launcher:
        [handle] = launcher.start([make_job(tmp_path, config=config)], None)
        assert end_of(handle).status is Status.finished
    [name] = creations(server)
    expected = [(f"{name}-{node}", worker) for node in range(2) for worker in range(4)]
    assert [(host.node, host.worker) for host in script.hosts[0]] == expected
    assert server.names() == []


def test_external_addresses_are_used_where_there_are_any(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    server.external = True
    script = Script()
    ends(endpoint, tmp_path, script)
    assert [host.address for host in script.hosts[0]] == list(server.addresses)


def test_a_rehearsal_is_told_who_is_who_and_a_real_tpu_is_not(
    endpoint: str, tmp_path: Path
) -> None:
    rehearsal, real = Script(), Script()
    config = tpu_config("hardware=tpu_v4_32", "hardware.simulate=true")
    for script, given in ((rehearsal, config), (real, tpu_config())):
        with launching(make_settings(endpoint, tmp_path), script) as launcher:
            [handle] = launcher.start([make_job(tmp_path, config=given)], None)
            end_of(handle)
    assert [argv[-3:] for argv in rehearsal.argvs] == [
        [
            "distributed.coordinator_address=127.0.0.1:8476",
            "distributed.num_processes=4",
            f"distributed.process_id={number}",
        ]
        for number in range(4)
    ]
    assert not any("distributed." in text for argv in real.argvs for text in argv)


def test_the_lease_is_renewed_and_idle_tpus_are_deleted(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    """The lease of a second is past long before the job ends."""
    go = threading.Event()
    script = Script(ends=[lambda: FINISHED if go.is_set() else None])
    with launching(make_settings(endpoint, tmp_path, lease_min=1 / 60), script) as launcher:
        [handle] = launcher.start([make_job(tmp_path)], None)
        eventually(lambda: len(script.hosts) == 1)
        [name] = creations(server)
        first = int(server.labels(name)["sdx-lease"])
        eventually(lambda: int(server.labels(name)["sdx-lease"]) > first + 1)
        go.set()
        end_of(handle)
        eventually(lambda: server.names() == [])


@pytest.mark.parametrize("at", ["queue", "work"])
def test_an_error_in_the_sweep_leaves_nothing(
    server: TpuServer, endpoint: str, tmp_path: Path, at: str
) -> None:
    if at == "queue":
        server.queue = QUEUE[:3]
    script = Script(ends=[lambda: None])
    handles: list[Handle] = []
    with (
        pytest.raises(KeyboardInterrupt),
        launching(make_settings(endpoint, tmp_path), script) as launcher,
    ):
        handles += launcher.start([make_job(tmp_path)], None)
        eventually(lambda: script.hosts or server.names("WAITING_FOR_RESOURCES"))
        raise KeyboardInterrupt
    assert end_of(handles[0]).status is Status.interrupted
    assert server.names() == [] and Ledger().entries() == []


def test_a_kept_tpu_is_used_by_the_next_sweep_of_its_owner(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    def sweep(script: Script, **more: Any) -> None:
        assert ends(endpoint, tmp_path, script, **more) == [Ended(Status.finished)]

    scripts = [Script() for _ in range(4)]
    sweep(scripts[0], keep=True)
    [kept] = server.names("ACTIVE")
    sweep(scripts[1], keep=True)
    assert scripts[1].hosts[0][0].node == kept
    sweep(scripts[2], owner="bob")
    assert scripts[2].hosts[0][0].node != kept and server.names("ACTIVE") == [kept]
    sweep(scripts[3])
    assert scripts[3].hosts[0][0].node == kept
    assert server.names() == []


def test_a_kept_tpu_of_another_kind_is_left_alone_and_swept_up_when_asked(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    ends(endpoint, tmp_path, Script(), keep=True)
    [kept] = server.names()
    ends(endpoint, tmp_path, Script(), runtime_version="another")
    assert server.names() == [kept]
    report = sweep_up(make_settings(endpoint, tmp_path))
    assert report.deleted == [kept] and server.names() == []


def test_a_bug_of_ours_in_one_job_is_that_jobs_failure(
    server: TpuServer, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(tpu_run, "tpu_folder", broken)
    [ended] = ends(endpoint, tmp_path, Script())
    assert ended == Ended(Status.failed, "ZeroDivisionError: oops")
    assert server.names() == []


class HungUp:
    """A terminal that nobody sits at any more."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")

    def fileno(self) -> int:
        raise OSError("it has no file that could be sent elsewhere")


def test_tpus_are_deleted_though_nobody_reads_what_is_said(
    server: TpuServer, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", HungUp())
    assert ends(endpoint, tmp_path, Script()) == [Ended(Status.finished)]
    assert server.names() == [] and Ledger().entries() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_that_asks_to_stop_interrupts_the_deleting(
    server: TpuServer,
    endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    heard: list[int] = []
    delete = server.DeleteQueuedResource

    def ask_to_stop(request: Any) -> Any:
        os.kill(os.getpid(), number)
        return delete(request)

    monkeypatch.setattr(server, "DeleteQueuedResource", ask_to_stop)
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        assert ends(endpoint, tmp_path, Script()) == [Ended(Status.finished)]
    finally:
        signal.signal(number, before)
    assert server.names() == [] and heard == []
    assert "sdx: TPUs are given back, which Ctrl-C does not interrupt" in capfd.readouterr().err


def test_one_that_could_not_be_deleted_is_deleted_at_the_end(
    server: TpuServer, endpoint: str, tmp_path: Path
) -> None:
    def preempt() -> RemoteEnd:
        server.preempt(server.names()[0])
        server.refuse("DeleteQueuedResource", grpc.StatusCode.PERMISSION_DENIED, "not now")
        return LOST

    [ended] = ends(endpoint, tmp_path, Script(ends=[preempt, *[lambda: FINISHED] * 3]))
    assert ended.status is Status.failed and "not now" in str(ended.reason)
    assert server.names() == [] and Ledger().entries() == []
