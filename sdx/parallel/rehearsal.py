"""`hardware.simulate=true`: the hosts of a target as processes of this machine.

The command that a person typed computes nothing: it starts itself once for each host, as a cluster
would, and passes on signals and the exit code. A host's devices are virtual ones of the CPU. What
the target computes is kept, but for what only its chips can run: `resolve.platform` says where.
No JAX here.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sdx.config.schema import Config
from sdx.record.launched import ENDED_WITH_RUN, end_with_driver, launched_job

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 75
_PARENT, _TYPED = "SDX_REHEARSAL_PIPE", "SDX_REHEARSAL_OVERRIDES"
_LOOK_EVERY_S = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_MOST_LINES = 30  # shown of a process that failed


def is_to_spawn(config: Config) -> bool:
    """Whether this command is to rehearse with processes for the hosts, and is none of them."""
    return (
        config.hardware.simulate
        and config.hardware.num_hosts > 1
        and config.distributed.process_id is None
    )


def rehearse(command: str, config: Config, overrides: Sequence[str]) -> int:
    """Runs `python -m sdx.COMMAND` in a process for each host; returns the exit code of all.

    The first one speaks to the terminal; of the others the last lines are shown where they fail.
    """
    with tempfile.TemporaryDirectory(prefix="sdx-rehearsal-") as folder:
        hosts = _Hosts(command, config, overrides, Path(folder))
        with _passed_on(hosts.stop):
            try:
                return hosts.wait()
            finally:
                hosts.kill()


def typed(overrides: list[str]) -> list[str]:
    """What a person typed: in a process of a rehearsal or a job of a sweep, at the command that
    started it. Call it first of all: from then on this process ends with that one."""
    end_with_driver()
    if _PARENT not in os.environ:
        job = launched_job()
        return overrides if job is None else list(job.overrides)
    pipe = int(os.environ.pop(_PARENT))

    def end_with_parent() -> None:
        os.read(pipe, 1)  # nothing is ever written: it is the end of the pipe
        os._exit(EXIT_FAILED)

    threading.Thread(target=end_with_parent, name="sdx-rehearsal", daemon=True).start()
    return json.loads(os.environ.pop(_TYPED))


class _Hosts:
    """A process for each host, started."""

    def __init__(self, command: str, config: Config, overrides: Sequence[str], folder: Path):
        from sdx.config.compose import to_yaml  # brings Hydra, which other starts need not wait for

        saved = folder / "config.yaml"
        saved.write_text(to_yaml(config), encoding="utf-8")
        self._logs = [folder / f"{n}.log" for n in range(config.hardware.num_hosts)]
        self._patience_s = config.distributed.heartbeat_timeout_s + 30
        self._is_stopped = 0
        self._pipe, self._our_end = os.pipe()
        environment = os.environ | {
            _PARENT: str(self._pipe),
            _TYPED: json.dumps(list(overrides)),
        }
        argv = [sys.executable, "-m", f"sdx.{command}", "--from", str(saved)]
        address = f"127.0.0.1:{_free_port()}"
        count = len(self._logs)
        print(
            f"rehearsal of hardware={config.hardware.name}: {count} processes for its hosts, "
            f"{(config.hardware.num_devices or count) // count} virtual CPU devices each",
            flush=True,
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        for number, log in enumerate(self._logs):
            keys = [
                f"distributed.coordinator_address={address}",
                f"distributed.num_processes={count}",
                f"distributed.process_id={number}",
            ]
            output = None if number == 0 else open(log, "wb")  # noqa: SIM115  # closed below
            self._processes.append(
                subprocess.Popen(
                    [*argv, *keys],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=None if output is None else subprocess.STDOUT,
                    pass_fds=[self._pipe],
                    start_new_session=True,  # Ctrl-C comes to us alone, and is passed on once
                )
            )
            if output is not None:
                output.close()

    def wait(self) -> int:
        """The exit code, when all have ended."""
        codes: dict[int, int] = {}
        first_end: float | None = None
        while len(codes) < len(self._processes):
            for number, process in enumerate(self._processes):
                code = process.poll()
                if number not in codes and code is not None:
                    codes[number] = code
                    self._note_end(number, code)
                    first_end = first_end or (time.monotonic() if code else None)
            if first_end is not None and time.monotonic() - first_end > self._patience_s:
                print("sdx: the other processes did not end by themselves", file=sys.stderr)
                self.kill()
            time.sleep(_LOOK_EVERY_S)
        code = self._exit_code([codes[number] for number in sorted(codes)])
        if code not in (0, EXIT_INTERRUPTED):
            self._show_logs(codes)
        return code

    def stop(self) -> None:
        """Asks all to stop together; asked again, ends them."""
        self._is_stopped += 1
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self._is_stopped == 1 else signal.SIGKILL)

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _exit_code(self, codes: Sequence[int]) -> int:
        """The first process's, then anyone's; ended by a signal is failed unless we sent it."""
        if self._is_stopped and all(code in (0, EXIT_INTERRUPTED) or code < 0 for code in codes):
            return EXIT_INTERRUPTED if any(codes) else 0
        plain = [code for code in codes if code > 0]
        return plain[0] if plain else EXIT_FAILED if any(codes) else 0

    def _note_end(self, number: int, code: int) -> None:
        if code >= 0 or self._is_stopped:
            return
        name = signal.Signals(-code).name
        count, seconds = len(self._processes), self._patience_s - 30
        print(
            f"sdx: process {number} of {count} was ended by {name}; the others notice within "
            f"{seconds} s (distributed.heartbeat_timeout_s)",
            file=sys.stderr,
            flush=True,
        )

    def _show_logs(self, codes: dict[int, int]) -> None:
        """The last lines of processes that failed, not of those that ended because of them."""
        for number, log in enumerate(self._logs[1:], start=1):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            followed = any(line.startswith(ENDED_WITH_RUN) for line in lines)
            followed |= codes[0] == codes[number] == EXIT_REFUSED  # said by the first one for all
            if lines and codes[number] and not followed:
                print(f"--- process {number} of {len(self._logs)}, exit code {codes[number]}:")
                print("\n".join(lines[-_MOST_LINES:]), flush=True)


@contextmanager
def _passed_on(act: Callable[[], None]) -> Iterator[None]:
    """`act` is called for each signal that asks to stop."""

    def handle(number: int, frame: FrameType | None) -> None:
        act()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
