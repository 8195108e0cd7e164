"""The workers of one job's TPU: made ready for its code, and the same command on all at once.

<remote_dir>/snapshots/<digest>/   the code, as it was copied
<remote_dir>/envs/<key>/           what it needs, as bootstrap.sh installed it
<remote_dir>/jobs/<name>/          config.yaml and job.json of a job
"""

import hashlib
import json
import os
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from sdx.config.launching import TpuSettings
from sdx.record.launched import PATIENCE_S, PIPE
from sdx.record.snapshot import Snapshot, pack
from sdx_launchers.jobs import LaunchError
from sdx_launchers.saying import say
from sdx_launchers.tpu.remote_processes import RemoteProcess, RemoteProcesses
from sdx_launchers.tpu.ssh import CONNECTION_FAILED, Host, last_lines, ssh_argv, start

_ANSWERS_WITHIN_S = 600.0  # a worker that exists: its sshd starts, the user's key arrives
_TRY_EVERY_S = 5.0
_CHANGED_KEY = "Host key verification failed"
_MOST_LINES = 20  # shown of an install that failed
_LOADER = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
# Run by the shell of a worker: where it keeps things, and which of them are there.
_LOOK = """umask 077; mkdir -p {root} && cd {root} && echo sdx-root "$(pwd -P)" && \
for path in snapshots/{digest} envs/{key}/ready; do \
if test -e $path; then echo sdx-has $path; fi; done"""
_UNPACK = """umask 077; cd {root} && mkdir -p snapshots && draft=$(mktemp -d snapshots/.XXXXXX) && \
tar -xzf - -C "$draft" --no-same-owner && \
(mv -T "$draft" snapshots/{digest} 2>/dev/null || rm -rf "$draft") && test -d snapshots/{digest}"""


class ConnectionLost(LaunchError):
    """A worker does not answer; whether it still exists, the cloud knows."""


@dataclass(frozen=True)
class Worker:
    """A worker that is ready; all paths are its own."""

    host: Host
    root: PurePosixPath
    python: str
    python_path: tuple[PurePosixPath, ...]

    def job_folder(self, name: str) -> PurePosixPath:
        """Where config.yaml and job.json of that job lie there."""
        return self.root / "jobs" / name


class Workers:
    """All workers of one job, in the order of its processes.

    `folder` is the launching side's record of this TPU: which keys its workers showed, what was
    said while they were made ready (`prepare-<n>.log`), and what jobs said (`worker-<n>.log`).
    """

    def __init__(self, hosts: Sequence[Host], settings: TpuSettings, folder: Path):
        self.hosts = tuple(hosts)
        self._settings = settings
        self._folder = folder
        self._ready: tuple[Worker, ...] = ()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False

    def prepare(self, snapshot: Snapshot) -> None:
        """Copies the code and installs what it needs, on all at once; what is there stays.

        Raises:
            ConnectionLost: a worker did not answer, or no longer.
            LaunchError: an installation failed; names the workers and shows what they said.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        packed = pack(snapshot)
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            futures = [
                pool.submit(self._prepare, number, host, snapshot, packed)
                for number, host in enumerate(self.hosts)
            ]
        errors = [future.exception() for future in futures]
        refused = [error for error in errors if isinstance(error, LaunchError)]
        if refused:
            are_lost = all(isinstance(error, ConnectionLost) for error in refused)
            kind = ConnectionLost if are_lost else LaunchError
            raise kind("\n".join(str(error) for error in refused))
        self._ready = tuple(future.result() for future in futures)

    def start(
        self,
        name: str,
        argv_of: Callable[[Worker, int], Sequence[str]],
        folder: Path,
        *,
        files: Sequence[str] = ("config.yaml", "job.json"),
        lease_s: float = 600.0,
        speaks: bool = False,
    ) -> RemoteProcesses:
        """The job `name` on all workers; `argv_of` is asked with a worker and its number.

        `files` of `folder` are copied to `Worker.job_folder(name)`. What worker 0 says comes to the
        terminal as well where it `speaks`. All are stopped when nobody here gives a sign of life
        for `lease_s`.
        """
        assert self._ready and "/" not in name and name not in ("", ".", ".."), name
        texts = {file: (folder / file).read_text(encoding="utf-8") for file in files}
        processes: list[RemoteProcess] = []
        try:
            for number, worker in enumerate(self._ready):
                order = {
                    "folder": str(worker.job_folder(name)),
                    "files": texts,
                    "argv": list(argv_of(worker, number)),
                    "cwd": str(worker.root),
                    "environment": self._environment(),
                    "pipe": PIPE,
                    "lease_s": lease_s,
                    "grace_s": PATIENCE_S,
                    "token": f"sdx-ended-{secrets.token_hex(8)}",
                }
                processes.append(self._start(worker, number, order))
        except LaunchError:
            for process in processes:
                process.client.kill()
            raise
        return RemoteProcesses(processes, speaks=speaks, sign_every_s=lease_s / 10)

    def close(self) -> None:
        """Ends what `prepare` is doing, from another thread; it raises ConnectionLost."""
        self._is_closed = True
        for client in tuple(self._running):
            client.kill()

    def _environment(self) -> dict[str, str]:
        names = self._settings.environment
        return {name: os.environ[name] for name in names} | {"PYTHONUNBUFFERED": "1"}

    def _start(self, worker: Worker, number: int, order: dict[str, object]) -> RemoteProcess:
        log = self._folder / f"worker-{number}.log"
        said_by_ssh = log.with_suffix(".ssh")
        command = shlex.join([worker.python, "-I", "-c", _LOADER])
        source = resources.files("sdx_launchers.tpu").joinpath("supervise.py").read_bytes()
        with open(log, "ab") as output, open(said_by_ssh, "wb") as errors:
            begin = output.tell()
            client = self._client(worker.host, command, output.fileno(), errors.fileno())
        assert client.stdin is not None
        process = RemoteProcess(worker.host, client, str(order["token"]), log, said_by_ssh, begin)
        try:
            client.stdin.write(b"%d\n" % len(source) + source)
            client.stdin.write(json.dumps(order).encode() + b"\n")
            os.set_blocking(client.stdin.fileno(), False)
        except BrokenPipeError:
            pass  # it has ended and says why
        return process

    def _prepare(self, number: int, host: Host, snapshot: Snapshot, packed: bytes) -> Worker:
        log = self._folder / f"prepare-{number}.log"
        log.write_bytes(b"")
        key = self._key(snapshot)
        remote_dir = self._settings.remote_dir
        fields = {"root": shlex.quote(remote_dir), "digest": snapshot.digest, "key": key}
        said = self._look(host, _LOOK.format(**fields), log)
        found = dict(line.split(" ", 1)[::-1] for line in said if line.startswith("sdx-has "))
        root = PurePosixPath(next(line for line in said if line.startswith("sdx-root "))[9:])
        path = root / "snapshots" / snapshot.digest
        if f"snapshots/{snapshot.digest}" not in found:
            self._run(host, _UNPACK.format(**fields), packed, log, "the copy of the code")
        python = self._settings.python or str(root / "envs" / key / "bin" / "python")
        if f"envs/{key}/ready" not in found:
            script = self._bootstrap(root, root / "envs" / key, path, python)
            if number == 0:  # of all of them it takes minutes
                say(f"sdx: {host.node}: installing, see {log}", aside=True)
            self._run(host, "bash -s", script.encode(), log, "the installation")
        places = tuple(path / part.relative_to(snapshot.path) for part in snapshot.python_path)
        return Worker(host, root, python, places)

    def _key(self, snapshot: Snapshot) -> str:
        """Names an installation: another one is made when what it is made of has changed."""
        parts = [self._settings.python, self._settings.install, self._settings.setup]
        sources = [snapshot.path / "pyproject.toml", *sorted(snapshot.path.glob("constraints/*"))]
        digest = hashlib.sha256(json.dumps(parts).encode())
        for source in sources:
            digest.update(source.read_bytes())
        return digest.hexdigest()[:12]

    def _bootstrap(
        self, root: PurePosixPath, env: PurePosixPath, snapshot: PurePosixPath, python: str
    ) -> str:
        settings = self._settings
        install = "sdx_default_install" if settings.python is None else ":"
        if settings.install is not None:
            install = settings.install.replace("{python}", shlex.quote(python))
            install = install.replace("{snapshot}", shlex.quote(str(snapshot)))
        places = {"SDX_ROOT": root, "SDX_ENV": env, "SDX_SNAPSHOT": snapshot, "SDX_PYTHON": python}
        return "\n".join(
            [
                *(f"{name}={shlex.quote(str(value))}" for name, value in places.items()),
                "sdx_setup() {\n:\n" + "\n".join(settings.setup) + "\n}",
                f"sdx_install() {{\n{install}\n}}",
                resources.files("sdx_launchers.tpu").joinpath("bootstrap.sh").read_text("utf-8"),
            ]
        )

    def _look(self, host: Host, command: str, log: Path) -> list[str]:
        """What `command` said, as soon as the worker answers."""
        deadline = time.monotonic() + _ANSWERS_WITHIN_S
        while True:
            begin = log.stat().st_size
            code = self._attempt(host, command, b"", log)
            said = log.read_bytes()[begin:].decode(errors="replace")
            if code == 0 and "sdx-root " in said:
                return said.splitlines()
            if _CHANGED_KEY in said or self._is_closed or time.monotonic() > deadline:
                raise ConnectionLost(
                    f"{host}: does not let us in (ssh ended with {code}):\n{last_lines(log, 3)}\n"
                    "fix: try ssh by hand; see hydra.launcher.{ssh_user,ssh_key,ssh_command}"
                    " and docs/tpu.md."
                )
            time.sleep(_TRY_EVERY_S)

    def _run(self, host: Host, command: str, input: bytes, log: Path, what: str) -> None:
        code = self._attempt(host, command, input, log)
        if code == 0:
            return
        said = last_lines(log, _MOST_LINES)
        kind = ConnectionLost if code == CONNECTION_FAILED or code < 0 else LaunchError
        raise kind(f"{host}: {what} ended with exit code {code}:\n{said}\nall of it: {log}")

    def _attempt(self, host: Host, command: str, input: bytes, log: Path) -> int:
        """Its exit code; what it says goes to `log`."""
        with open(log, "ab") as output:
            client = self._client(host, command, output.fileno(), subprocess.STDOUT)
        self._running.add(client)
        try:
            client.communicate(input)
        finally:
            self._running.discard(client)
        return client.returncode

    def _client(
        self, host: Host, command: str, stdout: int, stderr: int
    ) -> "subprocess.Popen[bytes]":
        argv = ssh_argv(self._settings, host, command, self._folder / "known_hosts")
        try:
            return start(argv, stdout, stderr)
        except OSError as error:
            raise LaunchError(f"{host}: {argv[0]} cannot start ({error}).") from None
