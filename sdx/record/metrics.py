"""Reading `metrics.jsonl`, one JSON object a line, and cutting it back before a resume."""

import json
from pathlib import Path
from typing import Any

from sdx.record.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows in order; [] without a file.

    A last line torn by a kill is left out; any other bad line is a ValueError.
    """
    lines = _lines(path)
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}:{number}: not a row of metrics: {line[:80]!r}")
    return rows


def truncate_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keeps the rows up to and with `step`, returns the others: going on tells no step twice.

    Unreadable lines are cut too and returned as {"unreadable": text}. The file is replaced in one
    act.
    """
    kept, cut = [], []
    for line in _lines(path):
        row = _row(line)
        if row is None:
            cut.append({"unreadable": line})
        elif row.get("step", 0) > step:
            cut.append(row)
        else:
            kept.append(line)
    text = "".join(f"{line}\n" for line in kept)
    if path.exists() and text != path.read_text(encoding="utf-8", errors="replace"):
        write_text(
            path, text
        )  # also where only the last newline is missing: the next row would join that line
    return cut


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
