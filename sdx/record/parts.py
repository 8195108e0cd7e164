"""What is appended to: one file, or in a store, where nothing can be appended, numbered parts.

`metrics.jsonl` is there `metrics/000001.jsonl`, `metrics/000002.jsonl`, …; the last part is put
again with each addition until it is `PART_BYTES` long.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sdx.record.behind import put_later
from sdx.record.store import AnyPath, ObjectPath

PART_BYTES = 1 << 16
_AT_ONCE = 8


class Parts:
    """Parts from the number `first` on; `path_of` names them, `head` begins each."""

    def __init__(self, path_of: Callable[[int], ObjectPath], first: int, head: bytes = b""):
        self._path_of = path_of
        self._number = first
        self._head = head
        self._content = head

    def append(self, content: bytes) -> None:
        """Is on its way when this returns, and there after `behind.flush`."""
        self._content += content
        put_later(self._path_of(self._number), self._content)
        if len(self._content) >= PART_BYTES:
            self._number += 1
            self._content = self._head


def text_parts(path: ObjectPath) -> Parts:
    """Goes on after the parts of `path` that are there."""
    there = parts_of(path)
    first = int(there[-1].stem) + 1 if there else 1
    return Parts(lambda number: _folder(path) / f"{number:06d}{path.suffix}", first)


def parts_of(path: AnyPath) -> list[AnyPath]:
    """The parts of `path` in order; `path` itself where it is a file; [] without either."""
    if isinstance(path, ObjectPath):
        return [_folder(path) / name for name in _versions(path)]
    return [path] if path.exists() else []


def read_parts(path: AnyPath) -> list[str]:
    """The text of each of `parts_of`, whatever is no UTF-8 replaced.

    They are of one moment, though another process may add to them or cut them back meanwhile: all
    but the last are the same before and after the reading, else everything is read again.
    """
    if isinstance(path, Path):
        return [_text(part) for part in parts_of(path)]
    before = _versions(path)
    while True:
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                texts = list(pool.map(lambda name: _text(_folder(path) / name), before))
        except FileNotFoundError:  # cut away after it was listed
            texts = None
        now = _versions(path)
        if texts is not None and _goes_on(before, now):
            return texts
        before = now


def _goes_on(before: dict[str, str], now: dict[str, str]) -> bool:
    """Whether the last of these parts has at most grown, and the others are as they were."""
    names = list(before)
    return names == list(now)[: len(names)] and all(
        before[name] == now[name] for name in names[:-1]
    )


def _versions(path: ObjectPath) -> dict[str, str]:
    """Of each of `parts_of`, by name."""
    there = _folder(path).versions()
    wanted = (name for name in there if Path(name).stem.isdecimal())
    return {name: there[name] for name in wanted if Path(name).suffix == path.suffix}


def _text(part: AnyPath) -> str:
    return part.read_text("utf-8", "replace")


def _folder(path: ObjectPath) -> ObjectPath:
    return path.with_suffix("")
