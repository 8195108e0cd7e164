"""Ctrl-C and its like, noted instead of raised: a sweep ends its jobs before it ends itself."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MOST = 3  # times asked: to save and stop, to stop at once, to leave everything as it is


class StopSignals:
    """Counts signals that ask to stop, while entered; the third one is a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or as soon as a signal comes."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        if ready:
            os.read(self._read, 64)

    def __enter__(self) -> "StopSignals":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        asked = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in asked}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._write, b".")
        if self.count >= _MOST:
            raise KeyboardInterrupt


@contextmanager
def unstoppable(said: str) -> Iterator[None]:
    """Within it nothing that asks to stop interrupts the main thread; `said` is the answer."""

    def answer(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # `print` may be what is interrupted, and takes no second one
            os.write(2, f"{said}\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, answer) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
