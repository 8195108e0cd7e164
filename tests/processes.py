"""Several processes of one command on this machine, each with virtual CPU devices of its own.

They find each other as those of a user would who gives `distributed.*` by hand.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_KILLED_AFTER_S = 600.0


@dataclass(frozen=True)
class Ended:
    """Exit codes and outputs (stdout and stderr in one), in the order of the processes."""

    codes: list[int]
    outputs: list[str]

    def __str__(self) -> str:
        """All of it, for the message of a failed assertion."""
        pairs = enumerate(zip(self.codes, self.outputs, strict=True))
        return "\n".join(f"--- process {i}: exit code {c}\n{text}" for i, (c, text) in pairs)


class Processes:
    """The running processes; `output(i)` is what process i has said so far."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]):
        self.running = list(processes)
        self._said: list[list[str]] = [[] for _ in processes]
        self._readers = [threading.Thread(target=self._read, args=(i,)) for i in range(len(self))]
        for reader in self._readers:
            reader.start()

    def __len__(self) -> int:
        return len(self.running)

    def output(self, number: int) -> str:
        return "".join(self._said[number])

    def send(self, number: int, what: signal.Signals) -> None:
        """The signal to that process alone."""
        self.running[number].send_signal(what)

    def wait_until_said(self, number: int, text: str, timeout_s: float = 600) -> None:
        """Returns once process `number` has printed `text`; AssertionError where it ends first."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output(number):
            ended = self.running[number].poll() is not None and not self._readers[number].is_alive()
            assert not ended or text in self.output(number), self.output(number)
            assert time.monotonic() < deadline, f"{text!r} not said in time:\n{self.output(number)}"
            time.sleep(0.02)

    def end(self, timeout_s: float = _KILLED_AFTER_S) -> Ended:
        """Waits for all of them; those that take longer are killed, with exit code -9."""
        deadline = time.monotonic() + timeout_s
        for process in self.running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for reader in self._readers:
            reader.join()
        codes = [process.wait() for process in self.running]
        return Ended(codes, [self.output(number) for number in range(len(self))])

    def _read(self, number: int) -> None:
        pipe = self.running[number].stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                self._said[number].append(line)


@contextmanager
def started(
    arguments: Sequence[str],
    *,
    num_processes: int = 2,
    folder: Path | Sequence[Path] = REPOSITORY,
    environment: dict[str, str] | None = None,
    explicit: bool = True,
) -> Iterator[Processes]:
    """So many processes of `python ARGUMENTS` in `folder` (or one each), with the overrides
    `distributed.*` at the end unless not `explicit`; all are killed on leaving.

    `arguments` are `["-m", "sdx.train", "model=tiny", ...]`. `{process}` in them, and in values of
    `environment`, is the number of the process. Devices are virtual: `hardware.num_devices` is
    shared between the processes.
    """
    port = free_port()
    folders = [folder] * num_processes if isinstance(folder, Path) else list(folder)
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    inherited |= {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    running: list[subprocess.Popen[str]] = []
    try:
        for number in range(num_processes):
            keys = [
                f"distributed.coordinator_address=127.0.0.1:{port}",
                f"distributed.num_processes={num_processes}",
                f"distributed.process_id={number}",
            ]
            own = [text.replace("{process}", str(number)) for text in arguments]
            given = {
                name: text.replace("{process}", str(number))
                for name, text in (environment or {}).items()
            }
            running.append(
                subprocess.Popen(
                    [sys.executable, *own, *(keys if explicit else ())],
                    cwd=folders[number],
                    env=inherited | given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            )
        processes = Processes(running)
        yield processes
        processes.end(0)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()


def run(arguments: Sequence[str], *, timeout_s: float = _KILLED_AFTER_S, **how: object) -> Ended:
    """`started` to the end; see there."""
    with started(arguments, **how) as processes:  # type: ignore[arg-type]
        return processes.end(timeout_s)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
