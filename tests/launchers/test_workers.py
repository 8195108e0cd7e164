"""Commands on four workers, which are real sshds of this machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdx.record.provenance import SNAPSHOT_RECORD
from sdx.record.snapshot import Snapshot
from sdx_launchers.jobs import LaunchError
from sdx_launchers.tpu import remote_processes, workers
from sdx_launchers.tpu.remote_processes import RemoteEnd, RemoteProcesses
from sdx_launchers.tpu.ssh import Host
from sdx_launchers.tpu.workers import ConnectionLost, Worker, Workers
from tests.launchers.sshd import SshdWorker, ssh_settings, sshd_workers
from tests.launchers.test_supervise import DEAF, SAVES, is_alive

DEADLINE_S = 300.0


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SshdWorker]]:
    with sshd_workers(tmp_path_factory.mktemp("ssh")) as up:
        yield up


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """A small one."""
    return make_snapshot(tmp_path / "snapshots", "print('one')")


def make_snapshot(folder: Path, code: str) -> Snapshot:
    digest = f"{abs(hash(code)):016x}"[:16]
    path = folder / digest
    files = {
        "pyproject.toml": '[project]\nname = "sdx"\ndependencies = ["small"]\n'
        '[project.optional-dependencies]\ntpu = []\ns3 = ["not-there"]\n',
        "sdx/__init__.py": code,
        "launchers/sdx_launchers/__init__.py": "",
    }
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    (path / SNAPSHOT_RECORD).write_text(json.dumps({"files": dict.fromkeys(files, "")}))
    return Snapshot(path, digest, None)


def hosts_of(machines: list[SshdWorker]) -> list[Host]:
    return [Host("node", number, machine.address) for number, machine in enumerate(machines)]


def ready(
    machines: list[SshdWorker], snapshot: Snapshot, folder: Path, **settings: object
) -> Workers:
    """Workers whose Python is this one."""
    given = ssh_settings(machines, **({"python": sys.executable} | settings))
    prepared = Workers(hosts_of(machines), given, folder / "tpu")
    prepared.prepare(snapshot)
    return prepared


def job_folder(folder: Path) -> Path:
    """The launching side's record of a job."""
    made = folder / "launch"
    made.mkdir()
    (made / "config.yaml").write_text("a: 1\n")
    (made / "job.json").write_text("{}\n")
    return made


def python(source: str, *failing: int, other: str = "") -> Callable[[Worker, int], list[str]]:
    """`python -c source` on the workers of those numbers, `other` on the others; without numbers
    `source` on all."""
    return lambda worker, number: [
        worker.python, "-c", source if not failing or number in failing else other
    ]  # fmt: skip


def wait(processes: RemoteProcesses) -> RemoteEnd:
    deadline = time.monotonic() + DEADLINE_S
    while (end := processes.poll()) is None:
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.02)
    return end


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def said(folder: Path, number: int) -> str:
    """In the log of that worker, by the record of the job."""
    log = folder.parent / "tpu" / f"worker-{number}.log"
    return log.read_text() if log.exists() else ""


def test_code_is_copied_once_and_a_job_finds_it_and_its_files(
    machines: list[SshdWorker],
    snapshot: Snapshot,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = ready(machines, snapshot, tmp_path)
    copies = [machine.home / "sdx" / "snapshots" / snapshot.digest for machine in machines]
    before = [copy.stat().st_ino for copy in copies]
    prepared.prepare(snapshot)
    assert [copy.stat().st_ino for copy in copies] == before

    def argv(worker: Worker, number: int) -> list[str]:
        path = ":".join(str(path) for path in worker.python_path)
        config = worker.job_folder("$(touch x) `y`") / "config.yaml"
        source = f"import os, sdx; print({number}, os.getcwd()); print(open('{config}').read())"
        return ["/usr/bin/env", f"PYTHONPATH={path}", worker.python, "-P", "-c", source]

    folder = job_folder(tmp_path)
    assert wait(prepared.start("$(touch x) `y`", argv, folder, speaks=True)) == RemoteEnd(0)
    for number, machine in enumerate(machines):
        assert said(folder, number) == f"one\n{number} {machine.home / 'sdx'}\na: 1\n\n"
        assert not [path for path in machine.home.rglob("x")]
    assert capsys.readouterr().out == said(folder, 0)


def test_one_failure_ends_all_and_says_whose_it_was(
    machines: list[SshdWorker],
    snapshot: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_processes, "_LEAVE_ALONE_S", 0.2)
    monkeypatch.setattr(remote_processes, "_SAVE_S", 0.2)
    prepared = ready(machines, snapshot, tmp_path)
    folder = job_folder(tmp_path)
    fails = "import sys, time; time.sleep(1); print('no such image'); sys.exit(255)"
    processes = prepared.start("job", python(fails, 2, other=DEAF), folder)
    end = wait(processes)
    assert end.code == 255
    assert end.reason == "worker 2 of node (127.0.0.3): exit code 255: no such image"
    children = [int(said(folder, number).split()[1]) for number in (0, 1, 3)]
    assert not any(is_alive(child) for child in children)


def test_a_killed_process_is_a_failure_and_the_others_may_save(
    machines: list[SshdWorker],
    snapshot: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_processes, "_LEAVE_ALONE_S", 0.2)
    prepared = ready(machines, snapshot, tmp_path)
    folder = job_folder(tmp_path)
    dies = "import os, time; time.sleep(1.5); os.kill(os.getpid(), 9)"
    end = wait(prepared.start("job", python(dies, 1, other=SAVES), folder))
    assert end == RemoteEnd(-9, "worker 1 of node (127.0.0.2): ended by SIGKILL")
    assert [said(folder, number).split()[-1] for number in (0, 2, 3)] == ["saved"] * 3


def test_all_are_asked_to_stop(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path
) -> None:
    prepared = ready(machines, snapshot, tmp_path)
    folder = job_folder(tmp_path)
    processes = prepared.start("job", python(SAVES), folder)
    wait_until(lambda: all("ready" in said(folder, number) for number in range(4)))
    processes.stop()
    assert wait(processes) == RemoteEnd(75)
    assert all("saved" in said(folder, number) for number in range(4))


def test_a_lost_connection_is_no_exit_code_and_nothing_runs_on(
    machines: list[SshdWorker],
    snapshot: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_processes, "_LEAVE_ALONE_S", 0.2)
    prepared = ready(machines, snapshot, tmp_path)
    folder = job_folder(tmp_path)
    processes = prepared.start("job", python(SAVES), folder)
    wait_until(lambda: all("ready" in said(folder, number) for number in range(4)))
    machines[3].lose_connections()
    end = wait(processes)
    assert end.code is None and end.reason is not None
    assert end.reason.startswith("worker 3 of node (127.0.0.4): the connection was lost"), end
    wait_until((machines[3].home / "sdx" / "saved").exists)
    wait_until(lambda: not any(machine.processes() for machine in machines))


LAUNCHER = """
import json, sys, time
from pathlib import Path
from sdx.config.launching import TpuSettings
from sdx.record.snapshot import Snapshot
from sdx_launchers.tpu.ssh import Host
from sdx_launchers.tpu.workers import Workers

given = json.loads(sys.argv[1])
hosts = [Host(*fields) for fields in given["hosts"]]
workers = Workers(hosts, TpuSettings(**given["settings"]), Path(given["folder"], "tpu"))
workers.prepare(Snapshot(Path(given["snapshot"]), given["digest"], None))
argv = lambda worker, number: [worker.python, "-c", given["source"]]
workers.start("job", argv, Path(given["folder"], "launch"), lease_s=3.0)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill -9", "frozen"])
def test_without_a_launcher_all_save_and_end(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path, number: signal.Signals
) -> None:
    folder = job_folder(tmp_path)
    settings = ssh_settings(machines, python=sys.executable)
    ways = ("python", "ssh_user", "ssh_key", "ssh_port")
    given = {
        "hosts": [(host.node, host.worker, host.address) for host in hosts_of(machines)],
        "settings": {name: getattr(settings, name) for name in ways},
        "folder": str(tmp_path),
        "snapshot": str(snapshot.path),
        "digest": snapshot.digest,
        "source": SAVES,
    }
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(given)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        wait_until(
            lambda: all("ready" in said(folder, n) for n in range(4)) or launcher.poll() is not None
        )
        assert launcher.poll() is None
        launcher.send_signal(number)
        wait_until(lambda: all("saved" in said(folder, n) for n in range(4)))
        wait_until(lambda: not any(machine.processes() for machine in machines))
    finally:
        launcher.kill()
        launcher.wait()


def test_what_is_installed_once_serves_the_next_code(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path
) -> None:
    install = "echo installed >> installed; mkdir $SDX_ENV/bin; ln -s /bin/true {python}"
    given = ssh_settings(machines, install=install, setup=["test ! -e $SDX_ENV/bin"])
    prepared = Workers(hosts_of(machines)[2:], given, tmp_path / "tpu")
    prepared.prepare(snapshot)
    later = make_snapshot(tmp_path / "snapshots", "print('two')")
    prepared.prepare(later)
    for machine in machines[2:]:
        root = machine.home / "sdx"
        assert (root / "snapshots" / later.digest / "sdx" / "__init__.py").exists()
        assert (root / "installed").read_text() == "installed\n"
    (later.path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    prepared.prepare(later)
    assert (machines[2].home / "sdx" / "installed").read_text() == "installed\n" * 2


def test_what_pyproject_asks_for_is_installed_by_itself(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path
) -> None:
    """From a folder of wheels that a line of the user names."""
    make_wheel(tmp_path / "wheels", "small", "1.0")
    setup = [f"export PIP_NO_INDEX=1 PIP_FIND_LINKS={tmp_path / 'wheels'}"]
    prepared = ready(machines[:1], snapshot, tmp_path, python=None, setup=setup)
    folder = job_folder(tmp_path)
    source = "import small, sys; print(small.VERSION, sys.prefix)"
    assert wait(prepared.start("job", python(source), folder)) == RemoteEnd(0), said(folder, 0)
    version, prefix = said(folder, 0).split()
    assert version == "1.0" and Path(prefix).parent == machines[0].home / "sdx" / "envs"


def make_wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = '{version}'\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_an_install_that_fails_is_shown_with_its_worker(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path
) -> None:
    fails = "if [ -e {snapshot}/../../../bad ]; then echo no space left >&2; exit 3; fi"
    install = f"mkdir $SDX_ENV/bin; {fails}; ln -s /bin/true {{python}}"
    (machines[1].home / "bad").touch()
    with pytest.raises(LaunchError) as caught:
        ready(machines, snapshot, tmp_path, python=None, install=install)
    assert not isinstance(caught.value, ConnectionLost)
    text = str(caught.value)
    assert "worker 1 of node (127.0.0.2): the installation ended with exit code 3" in text
    assert "no space left" in text and "worker 0" not in text
    assert "no space left" in (tmp_path / "tpu" / "prepare-1.log").read_text()


def test_a_worker_whose_sshd_comes_late_is_waited_for_and_another_key_is_refused(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_TRY_EVERY_S", 0.2)
    with sshd_workers(tmp_path / "ssh", 1) as [machine]:
        machine.pull_the_plug()
        late = threading.Timer(1.0, machine.start)
        late.start()
        prepared = ready([machine], snapshot, tmp_path)
        late.join()
        assert (machine.home / "sdx" / "snapshots" / snapshot.digest).is_dir()
        machine.renew()
        with pytest.raises(ConnectionLost, match="(?s)does not let us in.*[Hh]ost key"):
            prepared.prepare(snapshot)
        assert not (machine.home / "sdx").exists()


def test_a_worker_that_never_answers_is_given_up(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_ANSWERS_WITHIN_S", 0.0)
    settings = ssh_settings(machines, ssh_user="nobody-of-that-name")
    with pytest.raises(ConnectionLost, match="worker 0 of node.*ssh ended with 255"):
        Workers(hosts_of(machines)[:1], settings, tmp_path / "tpu").prepare(snapshot)


GCLOUD = """#!/bin/bash
set -e
[ "$1" = compute ] && [ "$2" = ssh ] && [ "$3" = node ]
worker=${4#--worker=} command=${5#--command=}
exec ssh -p PORT -i KEY -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
  -o LogLevel=ERROR -o BatchMode=yes 127.0.0.$((worker + 1)) "$command"
"""


def test_a_command_instead_of_ssh_and_a_token_that_is_written_nowhere(
    machines: list[SshdWorker], snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code, order, output and exit codes all go through one command like gcloud's."""
    canary = "hf_" + "canary" * 6
    monkeypatch.setenv("SDX_TEST_TOKEN", canary)
    monkeypatch.setenv("SDX_TEST_UNNAMED", "1")
    given = ssh_settings(machines)
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        GCLOUD.replace("PORT", str(given.ssh_port)).replace("KEY", str(given.ssh_key))
    )
    gcloud.chmod(0o700)
    template = [
        str(gcloud), "compute", "ssh", "{node}", "--worker={worker}", "--command={command}"
    ]  # fmt: skip
    prepared = ready(
        machines, snapshot, tmp_path, ssh_command=template, environment=["SDX_TEST_TOKEN"]
    )
    folder = job_folder(tmp_path)
    source = (
        "import os, sys, time;"
        "print(len(os.environ['SDX_TEST_TOKEN']), 'SDX_TEST_UNNAMED' in os.environ, flush=True);"
        "time.sleep(0.5); sys.exit(7)"
    )
    processes = prepared.start("job", python(source), folder)
    wait_until(lambda: said(folder, 0) == "39 False\n")
    argvs = [
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if is_readable(path)
    ]
    assert not any(canary.encode() in argv for argv in argvs)
    assert wait(processes).code == 7
    places = [tmp_path, *(machine.folder for machine in machines)]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if canary.encode() in path.read_bytes()] == []


def is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
