"""The table a sweep shows before it starts anything: its jobs, how they stand, what happens now."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdx.record.status import Status
from sdx.record.store import AnyPath
from sdx_launchers.runs.differences import short_names
from sdx_launchers.saying import say
from sdx_launchers.sweep.standing import ELSEWHERE, Standing

_STARTS = {None: "starts", Status.interrupted: "resumes", Status.finished: "goes on"}
_STYLES = {"skipped": "dim", "waits": "cyan", "left": "yellow"}


def what_happens(standing: Standing, retry_failed: bool) -> str:
    """One word, and for jobs that are left alone the reason they ended."""
    if standing.handle is not None:
        is_ours = standing.handle.id != ELSEWHERE
        return f"waits for job {standing.handle.id}" if is_ours else "waits, it runs elsewhere"
    if standing.is_to_start(retry_failed):
        return _STARTS.get(standing.status, "starts again")
    if standing.status in (Status.finished, Status.pruned):
        return "skipped"
    return "left"


def show_plan(heading: str, standings: Sequence[Standing], retry_failed: bool) -> None:
    """Prints the table. Nothing is cut: a terminal that is too narrow breaks the lines."""
    console = Console(width=10_000, highlight=False)
    with console.capture() as captured:
        console.print(Group(Text(heading, style="bold"), *_table(standings, retry_failed)))
    for line in captured.get().splitlines():
        say(line.rstrip())


def differing(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Of each job the overrides that not all jobs share, by key."""
    parsed = [dict(_pair(text) for text in texts) for texts in overrides]
    keys = dict.fromkeys(key for job in parsed for key in job)
    differ = [key for key in keys if len({job.get(key) for job in parsed}) > 1]
    return [{key: job[key] for key in differ if key in job} for job in parsed]


def label(overrides: Mapping[str, str]) -> str:
    """What tells a job from the others, on one line."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def shown_path(path: AnyPath) -> str:
    """As one would type it here."""
    if not isinstance(path, Path):
        return str(path)
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def _table(standings: Sequence[Standing], retry_failed: bool) -> list[RenderableType]:
    differ = differing([one.job.overrides for one in standings])
    keys = list(dict.fromkeys(key for job in differ for key in job))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("", *short_names(keys).values(), "state", "step", "now", "run"):
        grid.add_column(head, no_wrap=True)
    for number, (one, own) in enumerate(zip(standings, differ, strict=True), start=1):
        act = what_happens(one, retry_failed)
        state = "new" if one.status is None else one.status.name
        grid.add_row(
            str(number),
            *(Text(own.get(key, "")) for key in keys),  # a value such as [a,b] is no markup
            state,
            str(one.step or ""),
            Text(act, style=_STYLES.get(act.split()[0], "green")),
            Text(one.job.name),
        )
    return [grid, *_notes(standings, retry_failed)]


def _notes(standings: Sequence[Standing], retry_failed: bool) -> list[RenderableType]:
    """Why jobs are left alone, and how they would not be."""
    left = [one for one in standings if what_happens(one, retry_failed) == "left"]
    if not left:
        return []
    lines = [f"{one.job.name} {_word(one)}: {one.reason}" for one in left if one.reason]
    count, them = ("1 job", "it") if len(left) == 1 else (f"{len(left)} jobs", "them")
    fix = f"{count} failed or cancelled: hydra.sweeper.retry_failed=true starts {them} again."
    return [Text(line) for line in [*lines, fix]]


def _word(standing: Standing) -> str:
    return "" if standing.status is None else standing.status.name


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.lstrip("+").partition("=")
    return key, value
