"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR2 set a flag the loop looks at.

Python runs signal handlers only between bytecodes of the main thread, so none runs while that
thread is inside an XLA compilation. The kernel-level half of CPython's handler runs at any time and
writes the signal's number to a wake-up pipe; a watcher thread reads it and can end the process.

Many processes stop after the same step: from `join` on, SIGTERM belongs to the handler that
`jax.distributed.initialize` has put in place of ours, the other signals are sent on to it, and
JAX's preemption service agrees with all processes on the moment.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from jax._src import distributed  # where the notice of a signal is read; it has no public name
from jax.experimental import multihost_utils

from sdx.parallel.failures import Companions, within

EXIT_INTERRUPTED = 75  # sysexits.h EX_TEMPFAIL: try again
_Handler = Callable[[int, FrameType | None], object] | int | None
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_ON_EXIT_TIMEOUT_S = (
    5.0  # the callback writes a few small files; a hanging file system must not keep us
)
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # xla/pjrt/distributed/preemption/preemption_sync_manager.cc


class StopFlag:
    """Installs the handlers while entered (main thread only) and puts the old ones back after.

    `on_exit` is called from the watcher thread just before it ends the process with exit code 75:
    on a signal within `compiling()`, and on a second Ctrl-C anywhere. It should write the record
    and say how to go on. Of many processes `Companions` calls its `on_failure` instead.
    """

    def __init__(self, on_exit: Callable[[], None]) -> None:
        self._on_exit = on_exit
        self._received: signal.Signals | None = None
        self._interrupts = 0
        self._nothing_to_save = False
        self._deciding = threading.Lock()
        self._old_handlers: dict[signal.Signals, _Handler] = {}
        self._companions: Companions | None = None
        self._in_step = True
        self._is_noticed = False
        self._times_asked = 0
        self._is_agreed = False

    @property
    def requested(self) -> bool:
        """Whether to stop; of many processes in step, whether they agreed to."""
        if self._companions is None:
            return self._received is not None
        return self._is_agreed if self._in_step else self._is_noticed

    @property
    def signal_name(self) -> str | None:
        """The first signal that asked to stop, as SIGTERM; another process's is called that too."""
        if self._received is not None:
            return self._received.name
        return signal.SIGTERM.name if self.requested else None

    def join(self, companions: Companions, *, in_step: bool = True) -> None:
        """From here on this process stops with others; called once they have found each other.

        Those that work in step must stop in step: `requested` is true where `agreed` was. Others
        stop where each of them is.
        """
        if companions.are_many:
            self._companions, self._in_step = companions, in_step
            companions.look_out(self._look)

    def agreed(self) -> bool:
        """Whether to stop here. Many processes ask at the same places of their work, equally often,
        and hear the same."""
        if self._companions is not None and not self._is_agreed:
            self._times_asked += 1
            self._is_agreed = multihost_utils.reached_preemption_sync_point(self._times_asked)
        return self.requested

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
                if self._interrupts > 1 or (self._nothing_to_save and self._companions is None):
                    self._end()
            if self._companions is not None:
                os.kill(os.getpid(), signal.SIGTERM)

    def _look(self) -> None:
        """Ends all processes where one was asked to stop and this one has nothing to save."""
        self._is_noticed = self._is_noticed or _is_noticed()
        if self._nothing_to_save and self._is_noticed:
            self._end()

    def _end(self) -> None:
        if self._companions is not None:
            self._companions.fail(EXIT_INTERRUPTED, "interrupted")
            return
        within(_ON_EXIT_TIMEOUT_S, self._say_goodbye)
        os._exit(EXIT_INTERRUPTED)

    def _say_goodbye(self) -> None:
        try:
            self._on_exit()
        except Exception:
            traceback.print_exc()
        sys.stdout.flush()  # here, not after the wait: a blocked terminal would hang it
        sys.stderr.flush()


def _is_noticed() -> bool:
    """Whether JAX has told all processes of a SIGTERM that one of them got."""
    client = distributed.global_state.client
    try:
        return client is not None and bool(client.key_value_try_get(_NOTICE))
    except Exception:  # not found
        return False
