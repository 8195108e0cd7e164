"""Small objects put from a thread of their own, so that a slow store holds up no training step.

They are put in the order in which they came; newer content of an object takes the place of what
waits for it. What goes wrong is raised by the next call, once, and the object is tried again after.
"""

import threading
from collections.abc import Mapping
from typing import Any

from sdx.record.files import to_json, write_json
from sdx.record.redact import redact
from sdx.record.store import AnyPath, ObjectPath, patiently


class WriteBehind:
    """Objects on their way; any thread may call."""

    def __init__(self) -> None:
        self._waiting: dict[ObjectPath, bytes] = {}
        self._is_putting = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, path: ObjectPath, content: bytes) -> None:
        """Returns at once; raises what went wrong before."""
        with self._changed:
            self._raise()
            self._waiting[path] = content
            self._go()

    def flush(self) -> None:
        """Returns when everything is there; raises what went wrong."""
        with self._changed:
            if self._waiting:
                self._go()
            self._changed.wait_for(
                lambda: self._error is not None or not (self._waiting or self._is_putting)
            )
            self._raise()

    def _go(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sdx-put", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting and self._error is None)
                path = next(iter(self._waiting))
                content = self._waiting.pop(path)
                self._is_putting = True
            error = None
            try:
                patiently(lambda: path.write_bytes(content))  # noqa: B023
            except BaseException as caught:
                error = caught
            with self._changed:
                self._is_putting = False
                self._error = error
                if error is not None:  # in its old place, unless there is something newer
                    self._waiting = {path: content, **self._waiting}
                self._changed.notify_all()


_behind = WriteBehind()
put_later = _behind.put
flush = _behind.flush


def write_json_later(path: AnyPath, value: Mapping[str, Any]) -> None:
    """`write_json`, which for an object returns before it is there: see `flush`."""
    if isinstance(path, ObjectPath):
        put_later(path, redact(to_json(value)).encode())
    else:
        write_json(path, value)
