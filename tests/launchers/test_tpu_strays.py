"""Whose TPUs are deleted when nobody vouches for them, and whose never."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import grpc
import pytest

from sdx.config.launching import TpuSettings
from sdx.record.owner import this_process
from sdx_launchers.tpu import pool as tpu_pool
from sdx_launchers.tpu.client import Tpus
from sdx_launchers.tpu.ledger import Ledger
from sdx_launchers.tpu.requests import creation, labels, place_of, spec_of
from sdx_launchers.tpu.strays import sweep_up
from tests.launchers.test_tpu import creations, end_of, eventually
from tests.launchers.tpu_jobs import Script, launching, make_job, make_settings
from tests.launchers.tpu_server import QUEUE, TpuServer, serving


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
def settings(server: TpuServer, tmp_path: Path) -> Iterator[TpuSettings]:
    with serving(server) as endpoint:
        yield make_settings(endpoint, tmp_path)


def make(settings: TpuSettings, name: str, *, lease_s: float, **more: object) -> None:
    """A TPU that some launcher of that owner asked for, which then went away."""
    spec, place = spec_of(settings, 1), place_of(settings)
    owner = str(more.get("owner", settings.owner))
    keep = more.get("keep", False) is True
    marked = labels(owner, "s", "holder", time.time() + lease_s, shape=spec.shape, keep=keep)
    Tpus(place, settings.poll_s).create(creation(place, name, spec, marked, 60))


def note_dead(settings: TpuSettings, name: str) -> None:
    """An entry of a launcher of this machine that was killed."""
    ledger = Ledger()
    ledger.note(place_of(settings), name, str(settings.owner), "holder")
    [path] = Path(os.environ["XDG_STATE_HOME"]).rglob(f"{name}.json")
    fields = json.loads(path.read_text())
    fields["process"] = asdict(replace(this_process(), process_started=1))
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("state", ["ACTIVE", "WAITING_FOR_RESOURCES"])
def test_only_ones_own_expired_leases_are_deleted(
    server: TpuServer, settings: TpuSettings, state: str
) -> None:
    server.queue = QUEUE[: QUEUE.index(state) + 1]
    make(settings, "mine-expired", lease_s=-1)
    make(settings, "mine-living", lease_s=600)
    make(settings, "mine-kept", lease_s=-1, keep=True)
    make(settings, "anothers-expired", lease_s=-1, owner="bob")
    make(settings, "anothers-living", lease_s=600, owner="bob")
    eventually(lambda: len(server.names(state)) == 5)
    report = sweep_up(settings, kept=False)
    assert (report.deleted, report.in_use) == (["mine-expired"], ["mine-living"])
    assert report.kept == ["mine-kept"] and report.faults == []
    assert "mine-expired: deleted" in str(report)
    assert sweep_up(settings).deleted == ["mine-kept"]
    left = ["mine-living", "anothers-expired", "anothers-living"]
    assert server.names() == left


def test_a_launcher_of_this_machine_that_was_killed_vouches_for_nothing(
    server: TpuServer, settings: TpuSettings
) -> None:
    """Its lease is not waited for; neither is that of one which waits in the queue."""
    make(settings, "mine", lease_s=600)
    note_dead(settings, "mine")
    note_dead(settings, "never-made")
    assert sweep_up(settings).deleted == ["mine"]
    assert server.names() == [] and Ledger().entries() == []


def test_a_launcher_of_this_machine_that_lives_vouches_for_its_own(
    server: TpuServer, settings: TpuSettings
) -> None:
    make(settings, "mine", lease_s=-1)
    Ledger().note(place_of(settings), "mine", "ann", "holder")
    Ledger().note(place_of(settings), "about-to-be-made", "ann", "holder")
    assert sweep_up(settings).in_use == ["mine"]
    assert server.names() == ["mine"] and len(Ledger().entries()) == 2


def test_strays_are_looked_for_wherever_tpus_were_asked_for(
    server: TpuServer, settings: TpuSettings
) -> None:
    """Without a word about zone, project, emulator or owner."""
    Ledger().remember(place_of(settings), "ann")
    make(settings, "mine", lease_s=-1)
    make(settings, "anothers", lease_s=-1, owner="bob")
    assert sweep_up(TpuSettings(poll_s=0.02)).deleted == ["mine"]
    assert server.names() == ["anothers"]


def test_what_cannot_be_deleted_is_said_and_stays_on_the_ledger(
    server: TpuServer, settings: TpuSettings
) -> None:
    make(settings, "mine", lease_s=600)
    note_dead(settings, "mine")
    server.refuse("DeleteQueuedResource", grpc.StatusCode.PERMISSION_DENIED, "no")
    report = sweep_up(settings)
    [fault] = report.faults
    assert "roles/tpu.admin" in fault
    assert "gcloud compute tpus queued-resources delete mine --force" in fault
    assert [entry.name for entry in Ledger().entries()] == ["mine"]
    assert sweep_up(settings).deleted == ["mine"]


def test_an_api_that_refuses_is_a_fault_and_no_traceback(
    server: TpuServer, settings: TpuSettings
) -> None:
    server.refuse("ListNodes", grpc.StatusCode.PERMISSION_DENIED, "no")
    [fault] = sweep_up(settings).faults
    assert "roles/tpu.admin" in fault


def test_two_launchers_at_once_leave_each_others_tpus_alone(
    server: TpuServer, settings: TpuSettings, tmp_path: Path
) -> None:
    """Of two owners, and of one; a third finds and deletes what one of them lost."""
    scripts = [Script(ends=[lambda: None]) for _ in range(3)]
    owners = ["ann", "ann", "bob"]
    launchers = [launching(replace(settings, owner=owner), script)
                 for owner, script in zip(owners, scripts, strict=True)]  # fmt: skip
    with launchers[0] as first, launchers[1] as second, launchers[2] as third:
        for number, launcher in enumerate((first, second, third)):
            launcher.start([make_job(tmp_path, f"job{number}")], None)
        eventually(lambda: all(script.hosts for script in scripts))
        assert len(server.names("ACTIVE")) == 3
        make(settings, "stray", lease_s=-1)
        report = sweep_up(settings)
        assert report.deleted == ["stray"]
        assert set(report.in_use) == {script.hosts[0][0].node for script in scripts[:2]}
        with launching(replace(settings, owner="bob")) as fourth:
            [handle] = fourth.start([make_job(tmp_path, "job3")], None)
            end_of(handle)
        assert len(server.names("ACTIVE")) == 3
    assert server.names() == []


COMMAND = (
    "run_on=tpu_v4_8", "model=tiny", "train.max_steps=1", "hydra.launcher.zone=us-central2-b",
    "hydra.launcher.project=a-project", "hydra.launcher.owner=ann", "hydra.launcher.poll_s=0.1",
    "hydra.launcher.ssh_command=[bash,-c,'{command}']",
)  # fmt: skip


TRAINED = """import json, pathlib, sys, yaml
run = yaml.safe_load(pathlib.Path(sys.argv[-1]).read_text())["run"]
folder = pathlib.Path(run["output_dir"]) / run["name"]
folder.mkdir(exist_ok=True)
status = {"status": "finished", "step": 1, "updated": ""}
(folder / "status.json").write_text(json.dumps(status))
"""


def sweep(endpoint: str, root: Path, job: str) -> "subprocess.Popen[bytes]":
    """The command of a person, for whose only worker this machine stands: ssh is bash there, and
    the job the shell lines `job`."""
    (root / "mount").mkdir(exist_ok=True)
    python = root / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -P ] || exec {sys.executable} "$@"\n{job}\n')
    python.chmod(0o755)
    (root / "trained.py").write_text(TRAINED)
    argv = [
        *(sys.executable, "-m", "sdx.train", *COMMAND),
        f"hydra.launcher.api_endpoint={endpoint}",
        f"hydra.launcher.python={python}",
        f"hydra.launcher.remote_dir={root / 'worker'}",
        f"hydra.launcher.mounts=[{root / 'mount'}]",
        f"run.output_dir={root / 'mount' / 'runs'}",
    ]
    return subprocess.Popen(argv, cwd=root, start_new_session=True)


def until(process: "subprocess.Popen[bytes]", holds: Callable[[], object]) -> None:
    """Waits; the launcher must not have ended before."""

    def there() -> object:
        assert process.poll() is None
        return holds()

    eventually(there)


@pytest.fixture
def one_worker() -> Iterator[tuple[TpuServer, str]]:
    server = TpuServer(addresses=["127.0.0.1"], step_s=0.05)
    with serving(server) as endpoint:
        yield server, endpoint


@pytest.mark.parametrize("at", ["queue", "work"])
def test_what_a_killed_launcher_left_is_deleted_by_the_next_start(
    one_worker: tuple[TpuServer, str], tmp_path: Path, at: str
) -> None:
    server, endpoint = one_worker
    begun = tmp_path / "begun"
    server.queue = QUEUE[:3] if at == "queue" else QUEUE
    first = sweep(endpoint, tmp_path, f"touch {begun}; exec sleep 100000")
    in_queue = at == "queue"
    until(first, lambda: server.names(QUEUE[2]) if in_queue else begun.exists())
    [lost] = server.names()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert server.names() == [lost]
    server.queue = QUEUE
    second = sweep(endpoint, tmp_path, f'exec {sys.executable} {tmp_path}/trained.py "$@"')
    assert second.wait() == 0
    assert server.names() == [] and len(creations(server)) == 2
    deleted = [request.name for name, request in server.calls if name == "DeleteQueuedResource"]
    created = [name for name, _ in server.calls].index("CreateQueuedResource")
    again = [name for name, _ in server.calls].index("CreateQueuedResource", created + 1)
    assert deleted[0].endswith(lost)
    assert [name for name, _ in server.calls].index("DeleteQueuedResource") < again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_leaves_nothing(
    one_worker: tuple[TpuServer, str], tmp_path: Path, number: signal.Signals
) -> None:
    server, endpoint = one_worker
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    job = f"trap 'touch {ended}; exit 75' TERM; touch {begun}; while :; do sleep 0.1; done"
    process = sweep(endpoint, tmp_path, job)
    until(process, begun.exists)
    os.kill(process.pid, number)
    assert process.wait() != 0
    assert server.names() == [] and ended.exists()
