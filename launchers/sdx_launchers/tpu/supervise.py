"""Runs a job on a worker and ends it with the connection that asked for it.

This file is sent over ssh's standard input to the worker's Python, with an order (a line of JSON)
and then words, one a line: `stop`, `kill`, or nothing at all as a sign of life. It needs no more
than Python's own library. The job has a session of its own; its output goes to standard output,
and how it ended to standard error, behind a word that only the asking side knows.

The job is asked to save and end, and is ended when it has not, as soon as standard input ends (the
launcher or its ssh is gone) or no sign of life came for `lease_s` (the network is).
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

_WRITE_FOR_S = 1.0
_LAST_WORDS_S = 30.0  # something of the job may live in a session of its own and hold its output
_CANNOT_START = 126  # as a shell says it


def main() -> None:
    order = json.loads(sys.stdin.buffer.readline())
    try:
        code = _run(order)
    except OSError as error:  # a full disk, no such program
        print(f"sdx: the job cannot start on this worker: {error}", flush=True)
        code = _CANNOT_START
    sys.stderr.write(f"\n{order['token']} {code}\n")
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)  # a thread may hold standard input


def _run(order: dict[str, Any]) -> int:
    orders: queue.Queue[str] = queue.Queue()
    job = _Job(order)
    for work in (_read, job.wait):
        threading.Thread(target=work, args=(orders,), daemon=True).start()
    _follow(job, orders, order["lease_s"], order["grace_s"])
    job.end()
    return job.process.returncode


def _follow(job: "_Job", orders: "queue.Queue[str]", lease_s: float, grace_s: float) -> None:
    """Returns when the job has ended."""
    ends_at: float | None = None
    while True:
        patience = lease_s if ends_at is None else max(0.0, ends_at - time.monotonic())
        try:
            word = orders.get(timeout=patience)
        except queue.Empty:
            word = "gone" if ends_at is None else "kill"
        if word == "exited":
            return
        if word == "kill":
            job.signal_all(signal.SIGKILL)
        elif word == "stop":
            job.ask()
        elif word == "gone" and ends_at is None:
            ends_at = time.monotonic() + grace_s
            job.is_awaited = False
            job.ask()


def _read(orders: "queue.Queue[str]") -> None:
    for line in sys.stdin.buffer:
        orders.put(line.decode().strip())
    orders.put("gone")


class _Job:
    """The process, in a session of its own, and the thread that passes its output on."""

    def __init__(self, order: dict[str, Any]):
        self.is_heard = self.is_awaited = True
        folder = Path(order["folder"])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in order["files"].items():
            (folder / name).write_text(text, encoding="utf-8")
        os.set_blocking(1, False)
        reading, self._writing = os.pipe()  # the job sees its end when this process is gone
        self.process = subprocess.Popen(
            order["argv"],
            cwd=order["cwd"],
            env={**os.environ, **order["environment"], order["pipe"]: str(reading)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[reading],
            start_new_session=True,
        )
        os.close(reading)
        assert self.process.stdout is not None
        self._pump = threading.Thread(target=self._pass_on, args=(self.process.stdout,))
        self._pump.daemon = True
        self._pump.start()

    def wait(self, orders: "queue.Queue[str]") -> None:
        self.process.wait()
        orders.put("exited")

    def ask(self) -> None:
        """SIGTERM to the job itself: processes that work for it must live while it saves."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def signal_all(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Nothing of the job is left, and all that it said was passed on."""
        self.signal_all(signal.SIGKILL)
        self._pump.join(_LAST_WORDS_S)

    def _pass_on(self, output: IO[bytes]) -> None:
        while data := os.read(output.fileno(), 1 << 16):
            while data and self.is_heard:
                can_write = select.select([], [1], [], _WRITE_FOR_S)[1]
                try:
                    data = data[os.write(1, data) :] if can_write else data
                    self.is_heard = bool(can_write) or self.is_awaited
                except BlockingIOError:
                    continue
                except OSError:  # nobody listens any more; the job must go on until it has saved
                    self.is_heard = False


main()
