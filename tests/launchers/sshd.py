"""Workers of a TPU on this machine: real sshds on 127.0.0.1 and following, each with a home folder
of its own and an environment with nothing of ours."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sdx.config.launching import TpuSettings
from tests.conftest import require

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
_UP_WITHIN_S = 300.0
_MARK = "SDX_TEST_WORKER"


class SshdWorker:
    """One worker: its address, and the folder that is all it has."""

    def __init__(self, folder: Path, address: str, port: int):
        self.address, self.port = address, port
        self.folder, self.home = folder, folder / "home"
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self.home.mkdir(parents=True)
        self._configure()

    def start(self) -> None:
        """Returns when its sshd answers."""
        assert _SSHD is not None
        self._process = subprocess.Popen(
            [_SSHD, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / "log")],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _UP_WITHIN_S
        while not _answers(self.address, self.port):
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """What sshd runs for its users, and what those left behind."""
        mark = f"{_MARK}={self._mark}".encode()
        found: list[int] = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    def lose_connections(self) -> None:
        """Ends the sshds of all connections; what runs here goes on."""
        if self._process is not None:
            for pid in reversed(_descendants(self._process.pid, self.processes())):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def pull_the_plug(self) -> None:
        """Nothing runs here any more, as if the machine was taken away."""
        if self._process is None:
            return
        self.lose_connections()
        self._process.kill()
        self._process.wait()
        self._process = None
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def renew(self) -> None:
        """Another machine at the same address: an empty disk, and another key of its own."""
        self.pull_the_plug()
        shutil.rmtree(self.home)
        self.home.mkdir()
        self._make_host_key()
        self.start()

    def _configure(self) -> None:
        self._make_host_key()
        shell = self.folder / "shell"
        shell.write_text(
            "#!/bin/bash\n"
            f"mkdir -p {self.home}/tmp && cd {self.home} && exec env -i HOME={self.home} "
            f"TMPDIR={self.home}/tmp PATH=/usr/local/bin:/usr/bin:/bin {_MARK}={self._mark} "
            'bash -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        shell.chmod(0o700)
        config = {
            "Port": str(self.port),
            "ListenAddress": self.address,
            "HostKey": str(self.folder / "host_key"),
            "PidFile": "none",
            "AuthorizedKeysFile": str(self.folder.parent / "authorized_keys"),
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",
            "MaxStartups": "100",
            "ForceCommand": str(shell),
        }
        text = "\n".join(f"{name} {value}" for name, value in config.items())
        (self.folder / "sshd_config").write_text(text + "\n")

    def _make_host_key(self) -> None:
        _make_key(self.folder / "host_key")


@contextmanager
def sshd_workers(folder: Path, count: int = 4) -> Iterator[list[SshdWorker]]:
    """So many of them, up; all that runs there ends on leaving. Skips the test without sshd."""
    require(_SSHD is not None and shutil.which("ssh") is not None, "OpenSSH (sshd and ssh)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd does not start as root without
    folder.mkdir(parents=True, exist_ok=True)
    _make_key(folder / "id")
    shutil.copy(folder / "id.pub", folder / "authorized_keys")
    addresses = [f"127.0.0.{number + 1}" for number in range(count)]
    port = _free_port(addresses)
    workers = [SshdWorker(folder / f"w{n}", address, port) for n, address in enumerate(addresses)]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            worker.pull_the_plug()


def ssh_overrides(workers: Sequence[SshdWorker]) -> list[str]:
    """Keys of `hydra.launcher` with which ssh comes to them."""
    key = workers[0].folder.parent / "id"
    return [
        f"hydra.launcher.ssh_port={workers[0].port}",
        f"hydra.launcher.ssh_key={key}",
        f"hydra.launcher.ssh_user={getpass.getuser()}",
    ]


def ssh_settings(workers: Sequence[SshdWorker], **more: object) -> TpuSettings:
    """The same as settings; keywords are more of them."""
    keys = [text.removeprefix("hydra.launcher.").split("=") for text in ssh_overrides(workers)]
    given: dict[str, object] = dict(keys) | {"ssh_port": workers[0].port} | more
    return TpuSettings(**given)  # type: ignore[arg-type]


def _make_key(path: Path) -> None:
    for old in (path, path.with_name(f"{path.name}.pub")):
        old.unlink(missing_ok=True)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _free_port(addresses: Sequence[str]) -> int:
    """One that is free at all of them."""
    while True:
        with socket.socket() as first:
            first.bind((addresses[0], 0))
            port = int(first.getsockname()[1])
        try:
            for address in addresses:
                socket.create_server((address, port)).close()
        except OSError:
            continue
        return port


def _descendants(pid: int, without: Sequence[int]) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in map(int, children):
            if child not in without:
                found += [child, *_descendants(child, without)]
    return found
