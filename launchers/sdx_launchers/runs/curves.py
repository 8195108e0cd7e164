"""One picture of all runs: their loss while training and, where they have it, the objective."""

import io
import math
from collections.abc import Sequence
from typing import Any

from sdx_launchers.runs.differences import short_names, value_of
from sdx_launchers.runs.facts import RunFacts, read_columns
from sdx_launchers.runs.table import RunsTable, shown
from sdx_launchers.sweep.objective import FALLBACK, Value

_NAMED = 24  # runs in the legend: the best ones where there are more
_COLOURS = [f"C{number}" for number in range(10)]  # matplotlib's tab10
_LINES = ["-", "--", ":"]  # with the colours: thirty runs that can be told apart
_OTHERS = "#c8c8c8"
_SMOOTHED = 0.05  # of a curve's points, in one running mean
_LOG_RANGE = 20.0
_MOST_CHARACTERS = 44  # of a name in the legend


def draw_curves(table: RunsTable) -> bytes | None:
    """A PNG; None while no run has a value to draw.

    The best run has a thick line; a cross ends those that failed. The loss is a running mean.
    """
    read_columns(table.runs, FALLBACK)
    metrics = dict.fromkeys([FALLBACK, table.objective.metric])
    drawn = [metric for metric in metrics if any(run.column(metric) for run in table.runs)]
    if not drawn:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    named = _named(table)
    figure = Figure(figsize=(6.2 * len(drawn) + 3, 5), dpi=144, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for run in sorted(table.runs, key=lambda run: run.name in named):  # the named ones on top
            _draw(axes, run, metric, table, named.get(run.name))
        axes.set(xlabel="step", title=metric.replace("_", " "))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        _scale(axes)
    figure.legend(
        handles=_legend(table, named), loc="outside right upper", fontsize=8, frameon=False
    )
    png = io.BytesIO()
    canvas.print_png(png)
    return png.getvalue()


def _named(table: RunsTable) -> dict[str, int]:
    """Numbers of the runs that have a colour, in the table's order."""
    judged = [(run, table.best_of(run)) for run in table.runs]
    order = sorted(
        judged,
        key=lambda pair: math.inf if pair[1] is None else table.objective.key(pair[1].value or 0.0),
    )
    names = {run.name for run, _ in order[:_NAMED]}
    kept = [run.name for run in table.runs if run.name in names]
    return {name: number for number, name in enumerate(kept)}


def _style(number: int | None, *, is_best: bool) -> dict[str, Any]:
    if number is None:
        return {"color": _OTHERS, "linewidth": 0.8}
    line = _LINES[number // len(_COLOURS) % len(_LINES)]
    colour = _COLOURS[number % len(_COLOURS)]
    return {"color": colour, "linestyle": line, "linewidth": 2.6 if is_best else 1.3}


def _draw(axes: Any, run: RunFacts, metric: str, table: RunsTable, number: int | None) -> None:
    points = [(step, value) for step, value in run.column(metric) if value is not None]
    if not points:
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    smooth = _running_mean(values) if metric == FALLBACK else values
    style = _style(number, is_best=run is table.best)
    is_sparse = len(steps) == 1 or (len(steps) <= 30 and metric != FALLBACK)
    marker = "o" if is_sparse else None  # without one, a single point is not seen
    axes.plot(steps, smooth, marker=marker, markersize=3, **style)
    if run.status == "failed":
        axes.plot(steps[-1], smooth[-1], "x", color=style["color"], markersize=9, mew=2)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a few values around each; at the ends over as many as there are."""
    half = round(_SMOOTHED * len(values) / 2)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _scale(axes: Any) -> None:
    """Logarithmic where the curves span more than a line can show."""
    drawn = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
    if drawn and min(drawn) > 0 and max(drawn) / min(drawn) > _LOG_RANGE:
        axes.set_yscale("log")


def _legend(table: RunsTable, named: dict[str, int]) -> list[Any]:
    from matplotlib.lines import Line2D

    names = short_names(table.keys)
    handles = []
    for run in table.runs:
        if run.name not in named:
            continue
        is_best = run is table.best
        told = ", ".join(f"{names[key]} {value_of(run, key)}" for key in table.keys) or run.name
        best = _best_text(table.best_of(run))
        style = _style(named[run.name], is_best=is_best)
        handles.append(
            Line2D([], [], label=_cut(told) + best + (" (best)" if is_best else ""), **style)
        )
    if others := len(table.runs) - len(named):
        handles.append(Line2D([], [], label=f"{others} others", **_style(None, is_best=False)))
    return handles


def _best_text(best: Value | None) -> str:
    return f": {shown(best)}" if best is not None else ""


def _cut(text: str) -> str:
    # matplotlib reads $…$ as mathematics, and hides a label that begins with _
    text = text.replace("$", r"\$").lstrip("_")
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
