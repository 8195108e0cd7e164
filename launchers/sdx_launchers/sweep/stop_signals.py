"""Ctrl-C and its like, noted instead of raised: a sweep ends its jobs before it ends itself."""

import os
import select
import signal
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
