"""Failing together: what ends one process of a run ends all of them, with its reason.

A process that cannot go on leaves its reason with the coordination service of `jax.distributed`.
Each process has a thread that looks there twice a second, whatever its main thread waits for, and
gives a sign of life; the first one misses who no longer does. They leave through `os._exit`: JAX's
own end is a barrier, which a process in the middle of a collective never comes to, and after which
it aborts (jax 0.10.2: all of them, `shutdown_timeout_seconds` later, with a C++ stack for a
reason).
"""

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NoReturn

# The key-value client has no public name; Orbax, Flax and MaxText take it from here too.
from jax._src import distributed

from sdx.parallel.agreement import gather
from sdx.record.launched import ENDED_WITH_RUN

EXIT_FAILED = 1
_EVERY_S = 0.5
_RECORD_S, _LEAVE_S = 10.0, 5.0  # for writing the record, and for the others to have seen it
# How collectives end where another process is gone: that one, not this, is what the user looks for.
_CONSEQUENCE = re.compile(
    r"Error: [A-Z_]+: .*(gloo|nccl|rccl|connection (reset|closed)|socket closed)",
    re.DOTALL | re.IGNORECASE,
)
_MOST_CHARACTERS = 20_000  # of a traceback
_FAILURE, _ALIVE, _LEFT = "sdx/failure/", "sdx/alive/", "sdx/left/"  # folders of keys


@dataclass(frozen=True)
class Failure:
    """Why a run of many processes ends before its time."""

    process: int
    num_processes: int
    host: str
    exit_code: int
    reason: str
    trace: str = ""
    """The traceback, where the reason does not explain itself."""
    is_silent: bool = False
    """The process gave no sign of life any more; others say this for it."""

    @property
    def said(self) -> str:
        """The reason, with its process where that is not the one that writes the record."""
        if self.process == 0 and not self.is_silent:
            return self.reason
        return f"process {self.process} of {self.num_processes} on {self.host}: {self.reason}"


class Companions:
    """The processes of this run, while entered: none goes on when another has failed.

    An error that leaves the block ends all of them; leaving it without one waits for all.
    """

    def __init__(
        self,
        process_id: int = 0,
        num_processes: int = 1,
        *,
        heartbeat_timeout_s: float = 100.0,
        on_failure: Callable[[Failure], None] = lambda failure: None,
    ):
        """`on_failure` is called once, in the first process, from any thread: it shows why and
        writes the record. `num_processes=1` is a run that nobody shares."""
        self._id, self._count = process_id, num_processes
        self._patience_s = heartbeat_timeout_s
        self._on_failure = on_failure
        self._lookouts: list[Callable[[], None]] = []
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="sdx-companions", daemon=True)

    @property
    def are_many(self) -> bool:
        return self._count > 1

    def look_out(self, act: Callable[[], None]) -> None:
        """`act` is called at every look, twice a second, from the watching thread."""
        self._lookouts.append(act)

    def fail(self, exit_code: int, reason: str, *, trace: str = "") -> int:
        """Ends all processes with `exit_code`, the reason on record; alone, returns it.

        Where another process failed before, this one's error is but a consequence, and not shown;
        an error of the network between them is told only when none is found to be dead.
        """
        host, trace = socket.gethostname(), trace[-_MOST_CHARACTERS:]
        failure = Failure(self._id, self._count, host, exit_code, reason, trace)
        if not self.are_many:
            self._on_failure(failure)
            return exit_code
        if _CONSEQUENCE.search(reason):
            time.sleep(self._patience_s + 4 * _EVERY_S)  # the watcher ends us meanwhile
        try:
            _tell(failure)
        except Exception:  # there is one already, or the service is gone: the watcher ends us
            if threading.current_thread() is self._watcher:
                return exit_code
            time.sleep(2 * self._patience_s)
            self._leave(exit_code)
        self._is_over.set()
        self._say(failure, failure.trace or failure.reason)
        self._leave(exit_code)

    def __enter__(self) -> "Companions":
        if self.are_many:
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.are_many:
            return
        if error is not None:
            text = "".join(traceback.format_exception(error))
            reason = f"{type(error).__name__}: {error}"
            self.fail(EXIT_FAILED, reason, trace=text)
        gather(None)  # the last acts may take hours in one of them
        self._is_over.set()
        self._watcher.join()

    def _watch(self) -> None:
        signs = _Signs(self._id, self._count, self._patience_s)
        while not self._is_over.wait(_EVERY_S):
            try:
                failure = _failure_there()
                if failure is None and self._id == 0:
                    failure = self._missed(signs.silent())
                signs.give()
            except Exception as error:
                failure = self._service_gone(error)
            if self._is_over.is_set():  # the main thread leaves
                return
            if failure is not None and failure.process == self._id and not failure.is_silent:
                return  # so does the thread that has just told it
            if failure is not None:
                self._follow(failure)
            for act in self._lookouts:
                act()

    def _missed(self, silent: tuple[int, str] | None) -> Failure | None:
        """The failure that a process gives no sign of life any more, said for it."""
        if silent is None:
            return None
        reason = (
            f"it died or hangs, no sign of life for {self._patience_s:g} s "
            "(distributed.heartbeat_timeout_s); what it said last may tell why"
        )
        failure = Failure(silent[0], self._count, silent[1], EXIT_FAILED, reason, is_silent=True)
        try:
            _tell(failure)
        except Exception:  # another one was told meanwhile, or the service is gone
            return _failure_there()
        return failure

    def _service_gone(self, error: Exception) -> Failure:
        reason = f"it is gone, and with it what the processes meet at ({error})"
        return Failure(0, self._count, "another host", EXIT_FAILED, reason, is_silent=True)

    def _follow(self, failure: Failure) -> NoReturn:
        """Ends this process because of another one's failure."""
        self._say(failure, f"{ENDED_WITH_RUN}: {failure.said}")
        self._leave(failure.exit_code)

    def _say(self, failure: Failure, text: str) -> None:
        """On record in the first process, `text` in others; a terminal that takes nothing keeps no
        process from ending."""
        if self._id == 0:
            within(_RECORD_S, lambda: self._on_failure(failure))
        else:
            within(_LEAVE_S, lambda: print(text, file=sys.stderr, flush=True))

    def _leave(self, exit_code: int) -> NoReturn:
        """The first process is the last to go: the others hear of the failure from it."""
        within(_LEAVE_S, self._tell_left)
        within(_LEAVE_S, sys.stdout.flush)
        within(_LEAVE_S, sys.stderr.flush)
        os._exit(exit_code)

    def _tell_left(self) -> None:
        _service().key_value_set(f"{_LEFT}{self._id}", "", allow_overwrite=True)
        failure = _failure_there()
        expected = self._count - (failure is not None and failure.is_silent)
        while self._id == 0 and len(_entries(_LEFT)) < expected:
            time.sleep(_EVERY_S / 5)


class _Signs:
    """Signs of life by process; time counts only while this process itself is running."""

    def __init__(self, process_id: int, num_processes: int, patience_s: float):
        self._key = f"{_ALIVE}{process_id}"
        self._patience_s = patience_s
        self._given = 0
        self._seen: dict[int, str] = {}
        self._silent_s = dict.fromkeys(range(1, num_processes), 0.0)
        self._looked = time.monotonic()

    def give(self) -> None:
        self._given += 1
        sign = f"{self._given} {socket.gethostname()}"
        _service().key_value_set(self._key, sign, allow_overwrite=True)

    def silent(self) -> tuple[int, str] | None:
        """A process that gave none for as long as patience lasts, and its host."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 4 * _EVERY_S), now
        found = {int(key.rpartition("/")[2]): sign for key, sign in _entries(_ALIVE)}
        for process in self._silent_s:
            is_new = found.get(process) != self._seen.get(process)
            self._silent_s[process] = 0.0 if is_new else self._silent_s[process] + passed
        self._seen = found
        for process, seconds in self._silent_s.items():
            if seconds >= self._patience_s:
                return process, found.get(process, " an unknown host").partition(" ")[2]
        return None


def within(seconds: float, act: Callable[[], Any]) -> None:
    """Calls `act` in a thread and waits no longer than so; an error of it is shown."""

    def guarded() -> None:
        try:
            act()
        except Exception:
            traceback.print_exc()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)


def _service() -> Any:
    return distributed.global_state.client


def _tell(failure: Failure) -> None:
    """Raises an error of JAX where a failure is told already."""
    _service().key_value_set(f"{_FAILURE}first", json.dumps(asdict(failure)))


def _entries(folder: str) -> list[tuple[str, str]]:
    return _service().key_value_dir_get(folder)


def _failure_there() -> Failure | None:
    for _, text in _entries(_FAILURE):
        return Failure(**json.loads(text))
    return None
