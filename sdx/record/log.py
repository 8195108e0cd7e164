"""What a run said to its user, kept in `log.txt` across all its starts."""

from pathlib import Path

from sdx.record.files import now
from sdx.record.redact import redact


class Log:
    """Appends lines with the time, secrets blotted out; each is on disk when the call returns."""

    def __init__(self, path: Path):
        self._path = path

    def write(self, text: str) -> None:
        """Adds `text`; its further lines are indented under the first."""
        indented = redact(text).rstrip("\n").replace("\n", "\n    ")
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(f"{now()} {indented}\n")
