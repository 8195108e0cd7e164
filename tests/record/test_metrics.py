"""metrics.jsonl: read past a torn end, cut back before a resume."""

import json
from pathlib import Path

import pytest

from sdx.record.metrics import read_metrics, truncate_after

pytestmark = pytest.mark.fast
ROWS = [{"step": step, "loss": 1 / step} for step in range(1, 6)]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_no_file_has_no_rows(path: Path) -> None:
    assert read_metrics(path) == [] == truncate_after(path, 3)
    assert not path.exists()


def test_rows_past_the_step_are_cut_and_returned(path: Path) -> None:
    path.write_text("".join(LINES))
    assert truncate_after(path, 3) == ROWS[3:]
    assert path.read_text() == "".join(LINES[:3])
    assert truncate_after(path, 3) == []
    assert truncate_after(path, 0) == ROWS[:3]
    assert path.read_text() == ""


def test_a_torn_last_line_is_left_out_and_then_cut(path: Path) -> None:
    path.write_text("".join(LINES[:4]) + LINES[4][:9])
    assert read_metrics(path) == ROWS[:4]
    assert truncate_after(path, 10) == [{"unreadable": LINES[4][:9]}]
    assert path.read_text() == "".join(LINES[:4])


def test_a_missing_last_newline_is_put_back_for_the_next_row(path: Path) -> None:
    path.write_text("".join(LINES[:2]).rstrip("\n"))
    assert truncate_after(path, 2) == []
    with open(path, "a") as file:
        file.write(LINES[2])
    assert read_metrics(path) == ROWS[:3]


def test_a_bad_line_before_the_last_is_named(path: Path) -> None:
    path.write_text(LINES[0] + "oops\n" + LINES[1])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .*oops"):
        read_metrics(path)
    assert truncate_after(path, 9) == [{"unreadable": "oops"}]
    assert read_metrics(path) == ROWS[:2]
