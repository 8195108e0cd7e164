"""What the processes of a job have said: which files, their last lines, and what is added to them.

A launcher's logs come first, the log of the run itself after them: what ends a process before it
could write to its run is only in the former.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sdx.record.parts import parts_of, read_parts
from sdx.record.redact import redact
from sdx.record.store import AnyPath
from sdx_launchers.runs.facts import RunFacts

_TAIL_BYTES = 1 << 16
_TRACE = "Traceback (most recent call last)"
_PATTERNS = ("log.txt", "tpus/*/*.log")  # in a job's folder, of local jobs and of those on TPUs


def logs_of(run: RunFacts) -> list[AnyPath]:
    """Every log of the job there is, those of its newest place first."""
    folder = run.found.launch
    kept = [] if folder is None else [path for one in _PATTERNS for path in folder.glob(one)]
    kept.sort(key=lambda path: (-path.parent.stat().st_mtime, path.name != "worker-0.log", path))
    noted = [Path(name) for name in run.launch.get("logs") or ()]
    there: list[AnyPath] = [path for path in [*noted, *kept] if path.is_file()]
    own = run.found.paths.log
    return [*there, own] if parts_of(own) else there


def last_lines(path: AnyPath, count: int | None = None) -> list[str]:
    """At most so many; None: as many as the last 64 KiB hold."""
    size = _size(path)
    lines = _lines(_content(path, max(0, size - _TAIL_BYTES), size))
    return lines if count is None else lines[-count:]


def last_words(run: RunFacts, count: int) -> list[str]:
    """The end of the traceback that a job left, else of its first log."""
    logs = logs_of(run)
    for path in logs:
        lines = last_lines(path)
        traces = [number for number, line in enumerate(lines) if _TRACE in line]
        if traces:
            return lines[traces[-1] :][-count:]
    return last_lines(logs[0], count) if logs else []


class FollowedLogs:
    """The first log of each of several jobs as it grows; `say` gets every line of it once."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._read: dict[AnyPath, int] = {}
        self._speaker: AnyPath | None = None

    def look(self, runs: Sequence[RunFacts], count: int) -> None:
        """Says what came since the last look; of a log not seen before its last `count` lines."""
        for run in runs:
            for path in logs_of(run)[:1]:
                lines = self._new_lines(path, count)
                if lines and path != self._speaker:
                    self._speaker = path
                    self._say(f"==> {run.name}: {path} <==")
                for line in lines:
                    self._say(line)

    def _new_lines(self, path: AnyPath, count: int) -> list[str]:
        size, begin = _size(path), self._read.get(path)
        if begin is None:
            content = _content(path, max(0, size - _TAIL_BYTES), size)
        else:
            content = _content(path, begin if begin <= size else 0, size)  # it may begin anew
        whole = content[: content.rfind(b"\n") + 1]
        self._read[path] = size - (len(content) - len(whole))
        lines = _lines(whole)
        return lines[-count:] if begin is None else lines


def _size(path: AnyPath) -> int:
    if isinstance(path, Path):
        return path.stat().st_size
    return sum(len(text.encode()) for text in read_parts(path))


def _content(path: AnyPath, begin: int, end: int) -> bytes:
    if not isinstance(path, Path):
        return "".join(read_parts(path)).encode()[begin:end]
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _lines(content: bytes) -> list[str]:
    """Without secrets, and without what a terminal would take for a command."""
    lines = redact(content.decode("utf-8", "replace")).split("\n")
    shown = ["".join(char for char in line if char.isprintable() or char == "\t") for line in lines]
    return shown[:-1] if shown[-1] == "" else shown
