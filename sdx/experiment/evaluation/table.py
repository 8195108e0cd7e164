"""What an evaluation found, for people: one line a number, and what it is of."""

from typing import Any

Row = dict[str, Any]
_WIDTH = 17


def table(row: Row) -> str:
    """The row of `evaluation.jsonl` as lines of a terminal."""
    lines = [_line("source", _source(row))]
    if "pictures" in row:
        lines.append(
            _line("pictures", f"{row['pictures']['count']} of {row['pictures']['folder']}")
        )
    if "validation_loss" in row:
        lines += _loss_lines(row["validation_loss"], row["validation_loss_of"])
    if "fid" in row:
        of = row["fid_of"]["reference"]
        count = "" if of["count"] is None else f", {of['count']} pictures"
        lines.append(_line("FID", f"{row['fid']:.4f}  (against {of['path']}{count})"))
    if "clip_score" in row:
        of = row["clip_score_of"]
        error = "" if of["standard_error"] is None else f" ± {of['standard_error']:.4f}"
        lines.append(_line("CLIP score", f"{row['clip_score']:.4f}{error}  ({of['convention']})"))
    if "adherence" in row:
        found = row["adherence"]
        said = f"colour {found['colour']:.3f}, shape {found['shape']:.3f}"
        lines.append(_line("adherence", f"{said}  ({found['count']} held-out captions)"))
    return "\n".join(lines)


def _source(row: Row) -> str:
    model = row.get("model", {})
    if "step" not in model:
        return row["source"]
    kind = "averaged" if model["weights"] == "ema" else "raw"
    return f"{row['source']}, step {model['step']}, {kind} weights"


def _loss_lines(loss: float, of: Row) -> list[str]:
    parts, num_timesteps = of["by_bucket"], of["num_timesteps"]
    # Part k holds the timesteps t with t * parts // num_timesteps = k.
    starts = [-(-k * num_timesteps // len(parts)) for k in range(len(parts) + 1)]
    lines = [
        _line("validation loss", f"{loss:.6f}  ({of['num_examples']} examples of {of['split']})")
    ]
    for first, end, part in zip(starts, starts[1:], parts, strict=False):
        lines.append(_line(f"  t {first}-{end - 1}", f"{part:.6f}"))
    return lines


def _line(name: str, value: str) -> str:
    return f"{name:<{_WIDTH}}{value}"
