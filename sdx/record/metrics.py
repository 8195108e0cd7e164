"""Reading `metrics.jsonl`, one JSON object a line, and cutting it back before a resume."""

import json
from pathlib import Path
from typing import Any

from sdx.record.files import write_text
from sdx.record.parts import parts_of, read_parts
from sdx.record.store import AnyPath


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """The rows in order; [] without a file, or without parts of it.

    A last line torn by a kill is left out; any other bad line is a ValueError.
    """
    lines = _lines("".join(read_parts(path)))
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}:{number}: not a row of metrics: {line[:80]!r}")
    return rows


def read_column(path: AnyPath, name: str) -> list[tuple[int, float | None]]:
    """Step and value of the rows that have a value of that name, None where it was not finite; what
    has none is not even parsed. Otherwise as `read_metrics`."""
    lines, key = _lines("".join(read_parts(path))), json.dumps(name) + ":"
    column = []
    for number, line in enumerate(lines, start=1):
        if key not in line:
            continue
        row = _row(line)
        if row is not None and "step" in row:
            column.append((int(row["step"]), row[name]))
        elif number < len(lines):
            raise ValueError(f"{path}:{number}: not a row of metrics: {line[:80]!r}")
    return column


def truncate_after(path: AnyPath, step: int) -> list[dict[str, Any]]:
    """Keeps the rows up to and with `step`, returns the others: going on tells no step twice.

    Unreadable lines are cut too and returned as {"unreadable": text}. The file is replaced in one
    act, of parts the last one first, so that a kill between two leaves fewer rows and no gap.
    """
    cut: list[dict[str, Any]] = []
    for part, text in reversed(list(zip(parts_of(path), read_parts(path), strict=True))):
        kept, gone = _split(_lines(text), step)
        cut = gone + cut
        # also where only the last newline is missing: the next row would join that line
        if kept != text:
            if kept or isinstance(part, Path):
                write_text(part, kept)
            else:
                part.unlink()
    return cut


def _split(lines: list[str], step: int) -> tuple[str, list[dict[str, Any]]]:
    """The text of the rows up to `step`, and the others."""
    kept, cut = [], []
    for line in lines:
        row = _row(line)
        if row is None:
            cut.append({"unreadable": line})
        elif row.get("step", 0) > step:
            cut.append(row)
        else:
            kept.append(line)
    return "".join(f"{line}\n" for line in kept), cut


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
