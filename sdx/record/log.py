"""What a run said to its user, kept in `log.txt` across all its starts."""

from pathlib import Path

from sdx.record.files import now
from sdx.record.parts import text_parts
from sdx.record.redact import redact
from sdx.record.store import AnyPath, ObjectPath


class Log:
    """Appends lines with the time, secrets blotted out; each is on disk when the call returns, in a
    store after `behind.flush`."""

    def __init__(self, path: AnyPath):
        self._path = path
        self._parts = text_parts(path) if isinstance(path, ObjectPath) else None

    def write(self, text: str) -> None:
        """Adds `text`; its further lines are indented under the first."""
        indented = redact(text).rstrip("\n").replace("\n", "\n    ")
        line = f"{now()} {indented}\n"
        if self._parts is not None:
            self._parts.append(line.encode(errors="replace"))
        elif isinstance(self._path, Path):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
