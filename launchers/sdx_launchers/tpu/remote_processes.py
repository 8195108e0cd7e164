"""A job's processes on all its workers: watched, stopped together, and their logs shown."""

import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sdx.record.launched import ENDED_WITH_RUN, PATIENCE_S
from sdx_launchers.saying import say
from sdx_launchers.tpu.ssh import Host, last_lines

EXIT_INTERRUPTED = 75
_CONNECTION_FAILED = (1, 255)  # of gcloud, of ssh
_LOOK_EVERY_S = 0.2
_LEAVE_ALONE_S = 5.0  # processes of a run notice one another's failure, and say so in its record
_SAVE_S = 30.0  # from SIGTERM to SIGKILL, where one worker failed
_LET_GO_S = 30.0  # from SIGKILL there to the end of the connection
_MOST_LAST_LINES = 30  # what a library says at the end may follow our own
_MOST_CHARACTERS = 300  # of a log's last line, as a reason


@dataclass(frozen=True)
class RemoteEnd:
    """How a job's processes ended: the exit code of the one that failed first, else 75 where one
    was interrupted, else 0. None where a worker was lost before it could say.
    """

    code: int | None
    reason: str | None = None
    """Names the worker, and its signal or last words; None where all went well."""


@dataclass
class RemoteProcess:
    """The process of one worker: the ssh that runs it, and the files it writes here."""

    host: Host
    client: "subprocess.Popen[bytes]"
    token: str
    log: Path
    said_by_ssh: Path
    log_begin: int
    """Where in its log this start begins."""
    code: int | None = None
    """Of the job's process there; None while it runs and where it was lost."""
    has_ended: bool = False
    was_started: bool = False

    def look(self) -> bool:
        """Whether it ended since the last look."""
        if self.has_ended or self.client.poll() is None:
            return False
        self.has_ended = True
        if self.client.stdin is not None:
            with suppress(BrokenPipeError):
                self.client.stdin.close()
        said = self.said_by_ssh.read_text(errors="replace")
        told = rf"^{re.escape(self.token)} (-?\d+)\n"  # a line that was cut off tells nothing
        if (found := re.search(told, said, re.MULTILINE)) is not None:
            self.code, self.was_started = int(found[1]), True
        code = self.client.returncode
        if not self.was_started and code > 0 and code not in _CONNECTION_FAILED:
            self.code = code  # of the worker's shell, which found no such Python
        return True

    @property
    def has_failed(self) -> bool:
        return self.has_ended and self.code not in (0, EXIT_INTERRUPTED)

    @property
    def has_followed(self) -> bool:
        """Whether it says that it ended because another one failed."""
        last = last_lines(self.log, _MOST_LAST_LINES) if self.code == 1 else ""
        return any(line.startswith(ENDED_WITH_RUN) for line in last.splitlines())

    def tell(self, word: str) -> None:
        """A word to the supervisor there; an empty one is a sign of life."""
        assert self.client.stdin is not None
        with suppress(BlockingIOError, BrokenPipeError, ValueError):  # gone, or its network is
            self.client.stdin.write(f"{word}\n".encode())

    def reason(self) -> str:
        """Why it ended, for a person."""
        if self.code is None:
            said = last_lines(self.said_by_ssh, 1) or f"ssh ended with {self.client.returncode}"
            return f"{self.host}: the connection was lost ({said[:_MOST_CHARACTERS]})"
        if self.code < 0:
            return f"{self.host}: ended by {_signal_name(-self.code)}"
        said = last_lines(self.log if self.was_started else self.said_by_ssh, 1)[:_MOST_CHARACTERS]
        return f"{self.host}: exit code {self.code}{said and ': '}{said}"


class RemoteProcesses:
    """All of them. A thread watches: when one fails, the others are stopped."""

    def __init__(self, processes: Sequence[RemoteProcess], *, speaks: bool, sign_every_s: float):
        self._processes = processes
        self._sign_every_s = sign_every_s
        self._end: RemoteEnd | None = None
        self._failed: list[RemoteProcess] = []
        """In the order of their ends."""
        self._is_stopped = False
        self._steps: list[tuple[float, str]] = []
        """What is still to be said to those that run, and when; in order."""
        self._echo = _Echo(processes[0]) if speaks else None
        self._deciding = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="sdx-workers", daemon=True)
        self._watcher.start()

    def poll(self) -> RemoteEnd | None:
        """How they ended; None while one runs."""
        return self._end

    def stop(self) -> None:
        """Asks all to save and end, exit code 75; returns at once."""
        self._is_stopped = True
        self._tell("stop")

    def kill(self) -> None:
        """Ends all, and returns when they have."""
        self._is_stopped = True
        with self._deciding:
            self._steps = _ending(time.monotonic())
        self._watcher.join()

    def _watch(self) -> None:
        try:
            self._look_after()
            self._end = self._outcome()
        except Exception as error:  # a full disk, a folder that was removed; a TPU waits and costs
            for process in self._processes:
                process.client.kill()
            what = f"{type(error).__name__}: {error}"
            self._end = RemoteEnd(None, f"the workers cannot be watched any more ({what})")

    def _look_after(self) -> None:
        signed_at = 0.0
        while any(not process.has_ended for process in self._processes):
            time.sleep(_LOOK_EVERY_S)
            for process in self._processes:
                if process.look():
                    self._note(process)
            if time.monotonic() - signed_at > self._sign_every_s:
                signed_at = time.monotonic()
                self._tell("")
            self._take_steps()
            if self._echo is not None:
                self._echo.show()
        if self._echo is not None:
            self._echo.close()

    def _note(self, process: RemoteProcess) -> None:
        """The first that does not finish makes the others end; a failure does so sooner."""
        with self._deciding:
            was_first = not self._failed
            if process.has_failed:
                self._failed.append(process)
            if process.has_failed and was_first and not self._is_stopped:
                self._steps = _stopping(_SAVE_S)
            elif process.code != 0 and not self._steps:
                self._steps = _stopping(PATIENCE_S)

    def _take_steps(self) -> None:
        with self._deciding:
            due = [word for at, word in self._steps if at <= time.monotonic()]
            self._steps = self._steps[len(due) :]
        for word in due:
            self._tell(word)

    def _tell(self, word: str) -> None:
        for process in self._processes:
            if process.has_ended:
                continue
            if word == "let go":
                process.client.kill()
            else:
                process.tell(word)

    def _outcome(self) -> RemoteEnd:
        first = min(self._failed, key=lambda process: process.has_followed, default=None)
        if first is not None:
            return RemoteEnd(first.code, first.reason())
        codes = {process.code for process in self._processes}
        return RemoteEnd(EXIT_INTERRUPTED if EXIT_INTERRUPTED in codes else 0)


def _stopping(patience_s: float) -> list[tuple[float, str]]:
    begin = time.monotonic() + _LEAVE_ALONE_S
    return [(begin, "stop"), *_ending(begin + patience_s)]


def _ending(begin: float) -> list[tuple[float, str]]:
    return [(begin, "kill"), (begin + _LET_GO_S, "let go")]


class _Echo:
    """What one worker says, on the terminal as well."""

    def __init__(self, process: RemoteProcess):
        # closed when the job has ended
        self._log: IO[bytes] = open(process.log, "rb")  # noqa: SIM115
        self._log.seek(process.log_begin)

    def show(self) -> None:
        text = self._log.read().decode(errors="replace")
        if text:
            say(text, end="")

    def close(self) -> None:
        self.show()
        self._log.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
