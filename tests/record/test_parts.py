"""What grows in a store: parts that read as one text, put in the background, cut crash-safely."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sdx.record import parts as parts_module
from sdx.record.behind import WriteBehind, flush, write_json_later
from sdx.record.files import read_json
from sdx.record.log import Log
from sdx.record.metrics import read_metrics, truncate_after
from sdx.record.parts import Parts, parts_of, read_parts, text_parts
from sdx.record.store import ObjectPath, as_path
from tests.record.test_metrics import LINES, ROWS


@pytest.fixture
def metrics(bucket: str) -> ObjectPath:
    path = as_path(f"{bucket}/run/metrics.jsonl")
    assert isinstance(path, ObjectPath)
    return path


def append(path: ObjectPath, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a part."""
    monkeypatch.setattr(parts_module, "PART_BYTES", len(LINES[2]) + 1)
    writer = text_parts(path)
    for line in lines:
        writer.append(line.encode())
    flush()


def test_rows_in_parts_read_as_one_file(
    metrics: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_metrics(metrics) == [] == truncate_after(metrics, 3)
    append(metrics, LINES[:3], monkeypatch)
    append(metrics, LINES[3:], monkeypatch)  # another start
    assert [part.name for part in parts_of(metrics)] == [f"00000{n}.jsonl" for n in (1, 2, 3)]
    assert read_metrics(metrics) == ROWS
    assert read_parts(metrics)[0] == "".join(LINES[:2])


@pytest.mark.parametrize(("step", "left"), [(4, 2), (3, 2), (2, 1), (1, 1), (0, 0)])
def test_parts_are_cut_like_the_file(
    metrics: ObjectPath, monkeypatch: pytest.MonkeyPatch, step: int, left: int
) -> None:
    append(metrics, LINES, monkeypatch)
    assert truncate_after(metrics, step) == ROWS[step:]
    assert read_metrics(metrics) == ROWS[:step]
    assert len(parts_of(metrics)) == left
    append(metrics, LINES[step:], monkeypatch)
    assert read_metrics(metrics) == ROWS


def test_a_kill_while_parts_are_cut_leaves_no_gap(
    metrics: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(metrics, LINES, monkeypatch)

    def killed(self: ObjectPath, content: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ObjectPath, "write_bytes", killed)
        truncate_after(metrics, 1)
    assert read_metrics(metrics) == ROWS[:2]
    assert truncate_after(metrics, 1) == ROWS[1:2]


@pytest.mark.parametrize("when", range(5))
def test_who_reads_while_parts_are_cut_sees_one_story(
    metrics: ObjectPath, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Before the `when`th request of a reader, a run goes on from step 1."""
    append(metrics, LINES, monkeypatch)
    again = [{**row, "loss": 9.0} for row in ROWS[1:4]]
    requests = 0

    def meanwhile(act: Any) -> Any:
        def acting(path: ObjectPath) -> Any:
            nonlocal requests
            requests += 1
            if requests == when + 1:
                truncate_after(metrics, 1)
                append(metrics, [json.dumps(row) + "\n" for row in again], monkeypatch)
            return act(path)

        return acting

    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "_AT_ONCE", 1)
        patch.setattr(parts_module, "_text", meanwhile(parts_module._text))
        patch.setattr(parts_module, "_versions", meanwhile(parts_module._versions))
        seen = read_metrics(metrics)
    new = ROWS[:1] + again
    assert seen in (ROWS, new) and requests > when
    assert read_metrics(metrics) == new


def test_the_log_goes_on_across_starts(bucket: str) -> None:
    path = as_path(f"{bucket}/run/log.txt")
    for text in ("one\ntwo", "token hf_" + "aB3" * 11):
        Log(path).write(text)
        flush()
    first, second = read_parts(path)
    assert first.endswith("Z one\n    two\n") and second.endswith("Z token REDACTED\n")


class _Object(ObjectPath):
    """One that takes its time, and fails when told to."""

    log: list[tuple[str, Any]] = []
    gate = threading.Event()
    error: list[BaseException] = []

    def write_bytes(self, content: bytes) -> None:
        assert self.gate.wait(300)
        if self.error:
            raise self.error.pop()
        self.log.append((self.key, content))


@pytest.fixture
def slow() -> type[_Object]:
    _Object.log, _Object.error, _Object.gate = [], [], threading.Event()
    return _Object


@pytest.mark.fast
def test_nobody_waits_and_the_newest_content_is_put_in_order(slow: type[_Object]) -> None:
    behind = WriteBehind()
    a, b, c = (slow("s3", name) for name in "abc")
    behind.put(a, b"0")
    for number in range(1, 5):
        for path in (b, c):
            behind.put(path, bytes(str(number), "ascii"))
    slow.gate.set()
    behind.flush()
    assert [key for key, _ in slow.log] == ["a", "b", "c"] or len(slow.log) == 2
    assert slow.log[-2:] == [("b", b"4"), ("c", b"4")]


@pytest.mark.fast
def test_an_error_is_raised_by_the_next_call_and_nothing_is_lost(slow: type[_Object]) -> None:
    behind = WriteBehind()
    slow.error.append(ValueError("no"))
    slow.gate.set()
    behind.put(slow("s3", "a"), b"1")
    with pytest.raises(ValueError, match="no"):
        behind.flush()
    behind.put(slow("s3", "b"), b"2")
    behind.flush()
    assert slow.log == [("a", b"1"), ("b", b"2")]


def test_a_status_on_its_way_is_there_after_the_flush(bucket: str, tmp_path: Path) -> None:
    for path in (as_path(f"{bucket}/status.json"), tmp_path / "status.json"):
        for step in range(20):
            write_json_later(path, {"step": step})
        if path == tmp_path / "status.json":
            assert json.loads(path.read_text()) == {"step": 19}
        flush()
        assert read_json(path) == {"step": 19}


def test_parts_of_bytes_begin_with_their_head(bucket: str) -> None:
    folder = as_path(f"{bucket}/events")
    assert isinstance(folder, ObjectPath)
    parts = Parts(lambda number: folder / f"{number}", 1, head=b"head ")
    parts.append(b"a" * parts_module.PART_BYTES)
    parts.append(b"b")
    flush()
    assert (folder / "2").read_bytes() == b"head b"
    assert (folder / "1").size() == parts_module.PART_BYTES + 5
