"""What came of a sweep, in its folder: summary.csv, .json and .md, and curves.png.

Written by the sweep when it ends and by `sdx.runs` whenever it is asked; both may do so at once.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdx.record.files import now, write_json, write_text
from sdx.record.store import write_bytes
from sdx_launchers.runs.curves import draw_curves
from sdx_launchers.runs.differences import short_names, value_of
from sdx_launchers.runs.facts import RunFacts
from sdx_launchers.runs.found import find
from sdx_launchers.runs.job_logs import last_words
from sdx_launchers.runs.table import RunsTable, duration, printable, shown, tabulate
from sdx_launchers.sweep.objective import Value

CURVES = "curves.png"
_LAST_LINES = 60  # a traceback through JAX is long


def write(sweep_folder: Path) -> RunsTable:
    """Writes all four from what is on record of the sweep's runs at this moment."""
    table = tabulate(find(sweep_folder.absolute()))
    write_table(sweep_folder, table)
    return table


def write_table(folder: Path, table: RunsTable) -> None:
    """The same for a table that was read before."""
    rows = [_row(table, run) for run in table.runs]
    fields = {
        "written": now(),
        "objective": str(table.objective),
        "best": None if table.best is None else table.best.name,
        "keys": table.keys,
        "runs": rows,
    }
    write_json(folder / "summary.json", fields)
    write_text(folder / "summary.csv", _csv(table, rows))
    curves = draw_curves(table)
    if curves is not None:
        write_bytes(folder / CURVES, curves)
    write_text(folder / "summary.md", _page(folder.name, table, has_curves=curves is not None))


def _row(table: RunsTable, run: RunFacts) -> dict[str, Any]:
    last, best = table.last_of(run), table.best_of(run)
    return {
        "name": run.name,
        "keys": {key: value_of(run, key) for key in table.keys},
        "status": run.status,
        "reason": "; ".join([*filter(None, [run.reason]), *run.faults]) or None,
        "step": run.step,
        "max_steps": run.max_steps,
        "last": _plain(last),
        "best": _plain(best),
        "best_step": None if best is None else best.step,
        "wall_s": run.wall_s,
        "starts": len(run.attempts),
        "where": run.where,
        "run": str(run.found.paths.root),
    }


def _plain(value: Value | None) -> float | None:
    return None if value is None else value.value


def _csv(table: RunsTable, rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    others = [name for name in rows[0] if name not in ("name", "keys")] if rows else []
    writer.writerow(["name", *table.keys, *others])
    for row in rows:
        writer.writerow([row["name"], *row["keys"].values(), *(row[name] for name in others)])
    return text.getvalue()


def _page(name: str, table: RunsTable, *, has_curves: bool) -> str:
    names = short_names(table.keys)
    head = ["run", *(names[key] for key in table.keys)]
    head += ["status", "step", "last", "best", "time", "starts"]
    lines = [f"# Sweep {name}", "", f"{table.judged_by} {table.counts}.", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    lines += [_line(_page_cells(table, run)) for run in table.runs]
    if has_curves:
        lines += ["", f"![loss curves]({CURVES})"]
    for run in table.runs:
        if run.status == "failed" or run.faults:
            lines += ["", f"## {run.name}: {run.status}", ""]
            lines += [printable(text) for text in [*filter(None, [run.reason]), *run.faults]]
            if words := last_words(run, _LAST_LINES):
                lines += ["", *(f"    {line}" for line in words)]
    return "\n".join(lines) + "\n"


def _page_cells(table: RunsTable, run: RunFacts) -> list[str]:
    name = f"**{run.name}**" if run is table.best else run.name
    keys = [value_of(run, key) or "?" for key in table.keys]
    step = f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step)
    last, best = shown(table.last_of(run)), shown(table.best_of(run), with_step=True)
    return [name, *keys, run.status, step, last, best, duration(run.wall_s), str(len(run.attempts))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", r"\|") for cell in cells) + " |"
