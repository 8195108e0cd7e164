"""Asking a single process to stop: SIGTERM, SIGINT and SIGUSR2 set a flag the loop looks at.

Python runs signal handlers only between bytecodes of the main thread, so none runs while that
thread is inside an XLA compilation. The kernel-level half of CPython's handler runs at any time and
writes the signal's number to a wake-up pipe; a watcher thread reads it and can end the process.
Several processes stop together through JAX's preemption service instead: do not use this there.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 75  # sysexits.h EX_TEMPFAIL: try again
_Handler = Callable[[int, FrameType | None], object] | int | None
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_ON_EXIT_TIMEOUT_S = (
    5.0  # the callback writes a few small files; a hanging file system must not keep us
)


class StopFlag:
    """Installs the handlers while entered (main thread only) and puts the old ones back after.

    `on_exit` is called from the watcher thread just before it ends the process with exit code 75:
    on a signal within `compiling()`, and on a second Ctrl-C anywhere. It should write the record
    and say how to go on.
    """

    def __init__(self, on_exit: Callable[[], None]) -> None:
        self._on_exit = on_exit
        self._received: signal.Signals | None = None
        self._interrupts = 0
        self._nothing_to_save = False
        self._deciding = threading.Lock()
        self._old_handlers: dict[signal.Signals, _Handler] = {}

    @property
    def requested(self) -> bool:
        return self._received is not None

    @property
    def signal_name(self) -> str | None:
        """The first signal that asked to stop, as SIGTERM."""
        return None if self._received is None else self._received.name

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Within it a signal ends the process at once: there is nothing to save."""
        with self._deciding:
            self._nothing_to_save = True
            if self.requested:
                self._end()
        try:
            yield
        finally:
            with self._deciding:
                self._nothing_to_save = False

    def __enter__(self) -> "StopFlag":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        os.register_at_fork(after_in_child=self._forget)
        self._watcher = threading.Thread(target=self._watch, name="sdx-stop-watcher", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore_handlers()
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write)  # the watcher reads the end of the pipe and returns
        self._watcher.join()
        os.close(self._read)

    def _forget(self) -> None:
        """In a forked child: a SIGTERM for a data worker must end it and not reach our pipe."""
        if self._old_handlers:
            signal.set_wakeup_fd(-1)
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._old_handlers.items():
            if handler is not None:  # None: it was installed by C code and cannot be put back
                signal.signal(number, handler)
        self._old_handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Only there so that CPython writes to the pipe instead of taking the default action."""

    def _watch(self) -> None:
        while received := os.read(self._read, 1):
            number = received[0]
            if number not in _SIGNALS:
                continue
            with self._deciding:
                self._received = self._received or signal.Signals(number)
                self._interrupts += number == signal.SIGINT
                if self._nothing_to_save or self._interrupts > 1:
                    self._end()

    def _end(self) -> None:
        worker = threading.Thread(target=self._say_goodbye, daemon=True)
        worker.start()
        worker.join(_ON_EXIT_TIMEOUT_S)
        os._exit(EXIT_INTERRUPTED)

    def _say_goodbye(self) -> None:
        try:
            self._on_exit()
        except Exception:
            traceback.print_exc()
        sys.stdout.flush()  # here, not after the join: a blocked terminal would hang it
        sys.stderr.flush()
