"""What runs did, side by side: keys that differ, status, step, the objective, time and place.

On a terminal that is too narrow for it, each run has two lines instead of one row.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sdx_launchers.runs.differences import differing_keys, short_names, value_of
from sdx_launchers.runs.facts import UNREADABLE, RunFacts, read_columns, read_runs
from sdx_launchers.runs.found import Found
from sdx_launchers.saying import say
from sdx_launchers.sweep.objective import FALLBACK, Objective, Value

_STYLES = {
    "finished": "green",
    "running": "cyan",
    "queued": "yellow",
    "interrupted": "yellow",
    "failed": "bold red",
    UNREADABLE: "bold red",
    "cancelled": "dim",
    "pruned": "dim",
    "new": "dim",
}
_EXPECTED = ("finished", "running", "new", "queued")  # their reasons are nothing to look into
_MOST_CHARACTERS = 300  # of a reason


@dataclass(frozen=True)
class RunsTable:
    """Runs and what they are judged by; `asked` is what they should have been judged by."""

    runs: Sequence[RunFacts]
    objective: Objective
    asked: Objective

    @cached_property
    def keys(self) -> list[str]:
        """Those in which the runs differ."""
        return differing_keys(self.runs)

    @cached_property
    def best(self) -> RunFacts | None:
        """The best run, of equals the first; None while nothing is known, or of one run."""
        values = {run.name: self.best_of(run) for run in self.runs}
        judged = [(run, value) for run in self.runs if (value := values[run.name]) is not None]
        if len(self.runs) < 2 or not judged:
            return None
        return min(judged, key=lambda pair: self.objective.key(pair[1].value or 0.0))[0]

    def best_of(self, run: RunFacts) -> Value | None:
        return self.objective.best(run.column(self.objective.metric))

    def last_of(self, run: RunFacts) -> Value | None:
        return next(reversed(run.column(self.objective.metric)), None)

    @property
    def judged_by(self) -> str:
        """One line for people."""
        if {run.found.command for run in self.runs} == {"encode"}:
            return "Encodings have no metrics."
        if not any(run.column(self.objective.metric) for run in self.runs):
            return f"No run has a value of {self.asked.metric} yet."
        if self.objective != self.asked:
            return f"No run has {self.asked.metric}: judged by {self.objective} instead."
        return f"Judged by {self.objective}."

    @property
    def counts(self) -> str:
        """How many runs have which status."""
        return ", ".join(
            f"{n} {status}" for status, n in Counter(r.status for r in self.runs).items()
        )


def tabulate(
    found: Found, objective: Objective | None = None, known: Iterable[RunFacts] = ()
) -> RunsTable:
    """Reads the runs; `known` are those of a table before this one.

    Where no run has the objective, they are judged by their loss.
    """
    asked = objective or found.objective
    runs = read_runs(found, known)
    read_columns(runs, asked.metric)
    if any(run.column(asked.metric) for run in runs):
        return RunsTable(runs, asked, asked)
    read_columns(runs, FALLBACK)
    judges = any(run.column(FALLBACK) for run in runs)
    return RunsTable(runs, asked.fallback if judges else asked, asked)


def render(table: RunsTable, console: Console) -> RenderableType:
    """The table, what went wrong below it, and what it was judged by."""
    head, rows = _head(table), [_cells(table, run) for run in table.runs]
    grid = Table(*head, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for cells in rows:
        grid.add_row(*cells)
    is_wide = console.is_terminal and _width(console, grid) > console.width
    body = Group(*_cards(head, rows)) if is_wide else grid
    notes = [
        Text(f"{table.judged_by}{f' Best: {table.best.name}.' if table.best else ''}"),
        Text(f"{len(table.runs)} runs: {table.counts}." if len(table.runs) > 1 else ""),
    ]
    return Group(body, *_reasons(table), *(note for note in notes if note.plain))


def print_table(table: RunsTable, console: Console) -> None:
    """Where there is no terminal as wide as it is, and without colours."""
    wide = Console(width=10_000, color_system=None, highlight=False)
    shown = console if console.is_terminal else wide
    with shown.capture() as captured:
        shown.print(render(table, shown))
    for line in captured.get().splitlines():
        say(line.rstrip())


def shown(value: Value | None, *, with_step: bool = False) -> str:
    """A metric as people read it; nan where it was not finite, nothing where there is none."""
    if value is None:
        return ""
    number = math.nan if value.value is None else value.value
    return f"{number:.4g} @{value.step}" if with_step else f"{number:.4g}"


def duration(seconds: float | None) -> str:
    """1h03m, 2m07s, 9s."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def printable(text: str) -> str:
    """One line, without what a terminal would take for a command."""
    kept = "".join(char if char.isprintable() else " " for char in text)
    return kept if len(kept) <= _MOST_CHARACTERS else kept[:_MOST_CHARACTERS] + "…"


def _head(table: RunsTable) -> list[str]:
    names = short_names(table.keys)
    keys = [names[key] for key in table.keys]
    return ["", "run", *keys, "status", "step", "last", "best", "time", "starts", "where"]


def _cells(table: RunsTable, run: RunFacts) -> list[Text]:
    keys = [value_of(run, key) for key in table.keys]
    step = f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step or "")
    texts = [
        "*" if run is table.best else "",
        run.name,
        *("?" if value is None else value for value in keys),
        run.status,
        step,
        shown(table.last_of(run)),
        shown(table.best_of(run), with_step=True),
        duration(run.wall_s),
        str(len(run.attempts) or ""),
        run.where,
    ]
    cells = [Text(printable(text), no_wrap=True) for text in texts]
    cells[2 + len(keys)].stylize(_STYLES.get(run.status, ""))
    if run is table.best:
        cells[1].stylize("bold")
    return cells


def _cards(head: Sequence[str], rows: Iterable[Sequence[Text]]) -> Iterator[Text]:
    """Two lines a run: its name and status, then all else with its name before it."""
    for mark, name, *others in rows:
        at = head.index("status") - 2
        status = others.pop(at)
        yield Text.assemble(mark if mark.plain else " ", " ", name, "  ", status, overflow="fold")
        names = [*head[2 : at + 2], *head[at + 3 :]]
        told = [f"{key} {cell}" for key, cell in zip(names, others, strict=True) if cell.plain]
        yield Text("    " + "  ".join(told), overflow="fold")


def _reasons(table: RunsTable) -> Iterator[Text]:
    for run in table.runs:
        reasons = run.faults if run.faults or run.status in _EXPECTED else [run.reason or ""]
        for reason in filter(None, reasons):
            yield Text(f"{run.name}: {printable(reason)}", overflow="fold")


def _width(console: Console, grid: Table) -> int:
    options = console.options.update(max_width=10_000)
    return Measurement.get(console, options, grid).maximum
