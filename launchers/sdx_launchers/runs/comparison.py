"""Two runs side by side: keys, code, packages and metrics in which they differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdx.config.leaves import spelled
from sdx.record.files import read_json
from sdx.record.metrics import read_metrics
from sdx.record.paths import RunPaths
from sdx.record.store import AnyPath
from sdx.record.validation import history_of
from sdx_launchers.runs.facts import flat

_PROGRAM = ("git_commit", "python", "platform", "host", "devices", "compiler_flags", "attention")
_SCORES = ("validation_loss", "fid", "clip_score")
_PLACE = ("run.name", "run.output_dir")  # every run has its own


@dataclass(frozen=True)
class Comparison:
    """Sections by title, each a table of a name and its value in both runs; None: there is none."""

    runs: tuple[str, str]
    sections: Mapping[str, list[tuple[str, Any, Any]]]


class NotComparable(ValueError):
    """Something that is no run; exit code 2."""


def compare(first: AnyPath, second: AnyPath) -> Comparison:
    """What differs between two runs; metrics are shown whether they differ or not."""
    records = [_record(place) for place in (first, second)]
    sections = {
        "Keys": _differing(*(_config(record) for record in records)),
        "Code": [*_differing(*map(_program, records)), *_patches(first, second, records)],
        "Packages": _differing(*(record.get("packages") or {} for record in records)),
        "Metrics": _both(_metrics(first, records[0]), _metrics(second, records[1])),
    }
    return Comparison((str(first), str(second)), sections)


def render(comparison: Comparison) -> str:
    """As text, wide enough for the longest name."""
    lines = [f"A  {comparison.runs[0]}", f"B  {comparison.runs[1]}"]
    for title, rows in comparison.sections.items():
        lines += ["", title]
        if not rows:
            lines.append("  the same" if title != "Metrics" else "  none")
            continue
        cells = [(name, _shown(a), _shown(b)) for name, a, b in rows]
        widths = [max(len(row[column]) for row in [*cells, ("", "A", "B")]) for column in range(3)]
        for row in [("", "A", "B"), *cells]:
            padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
            lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def _record(place: AnyPath) -> dict[str, Any]:
    record = read_json(RunPaths[Any](place).run)
    if record is None:
        raise NotComparable(f"{place}: holds no run (no run.json); give the folder of a run.")
    return record


def _config(record: Mapping[str, Any]) -> dict[str, Any]:
    values = flat(record.get("config") or {})
    return {key: value for key, value in values.items() if key not in _PLACE}


def _program(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in _PROGRAM}


def _patches(
    first: AnyPath, second: AnyPath, records: list[dict[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    """The files of either's uncommitted changes that are not the same in both."""
    texts = [_files_of(_patch(*pair)) for pair in zip((first, second), records, strict=True)]
    for name, a, b in _differing(*texts):
        yield f"uncommitted {name}", _changed(a), _changed(b)


def _patch(place: AnyPath, record: Mapping[str, Any]) -> str:
    name = record.get("git_patch")
    path: Any = place
    for part in str(name).split("/"):
        path = path / part
    return path.read_text("utf-8", "replace") if name and path.is_file() else ""


def _files_of(patch: str) -> dict[str, str]:
    """The part of a patch about each file, by its name; sections begin as git begins them."""
    parts = ("\n" + patch).split("\ndiff --git ")[1:]
    return {part.partition("\n")[0].rpartition(" b/")[2]: part for part in parts}


def _changed(part: str | None) -> str | None:
    if part is None:
        return None
    lines = part.splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    return f"+{added} -{removed} lines"


def _metrics(place: AnyPath, record: Mapping[str, Any]) -> dict[str, Any]:
    """The last value of every metric, the best validation loss, and what sdx.evaluate found."""
    paths, last = RunPaths[Any](place), dict[str, Any]()
    for row in read_metrics(paths.metrics):
        last |= row
    history = history_of(record.get("validation"))
    for step in history.best(history.losses):
        last["best validation_loss"] = f"{_shown(history.losses[step])} @{step}"
    for row in read_metrics(paths.evaluation):
        scores = {name: row.get(name) for name in _SCORES}
        last |= {
            f"sdx.evaluate {name}": score for name, score in scores.items() if score is not None
        }
    return last


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])]


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [row for row in _both(first, second) if row[1] != row[2]]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else spelled(value)
    return "".join(char if char.isprintable() else " " for char in text)
