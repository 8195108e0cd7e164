"""The validation losses of a run, step by step: `validation` in run.json.

    {"last": 0.31, "step": 600, "best": 0.29, "best_step": 400, "of": "1f3c…[:512]",
     "losses": {"200": 0.33, "400": 0.29, "600": 0.31}}

A loss is written before the checkpoint of its step is saved, so that every checkpoint that could be
the best is known as such after a kill. `of` names the examples; losses of others are forgotten.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sdx.record.files import read_json
from sdx.record.paths import RunPaths
from sdx.record.store import AnyPath, as_path

BEST: Literal["best"] = "best"
Step = int | Literal["best"]
"""A checkpoint as people name it: its step, or the one of lowest validation loss."""


@dataclass
class ValidationHistory:
    """Losses by step, ascending; one that was not finite is NaN and never the best."""

    of: str = ""
    losses: dict[int, float] = field(default_factory=dict)

    def best(self, steps: Iterable[int], count: int = 1) -> list[int]:
        """At most `count` of these steps, lowest loss first; those never measured do not count."""
        losses = dict(self.losses)  # training may add to it while a save asks
        known = [step for step in steps if math.isfinite(losses.get(step, math.nan))]
        return sorted(known, key=lambda step: (losses[step], step))[:count]

    def cut_after(self, step: int) -> None:
        """Forgets what was measured of later steps, which will be trained again."""
        self.losses = {known: loss for known, loss in self.losses.items() if known <= step}

    def fields(self) -> dict[str, Any]:
        """As it stands in run.json."""
        last, best = max(self.losses, default=None), self.best(self.losses)
        return {
            "last": None if last is None else _plain(self.losses[last]),
            "step": last,
            "best": self.losses[best[0]] if best else None,
            "best_step": best[0] if best else None,
            "of": self.of,
            "losses": {str(step): _plain(loss) for step, loss in self.losses.items()},
        }


def read_history(run: AnyPath) -> ValidationHistory:
    """What the run.json at `run` says of it; empty where nothing was ever measured."""
    return history_of((read_json(run) or {}).get("validation"))


def history_of(fields: dict[str, Any] | None) -> ValidationHistory:
    """As `ValidationHistory.fields` wrote it; empty for None."""
    if fields is None:
        return ValidationHistory()
    known = sorted((int(step), loss) for step, loss in fields["losses"].items())
    losses = {step: math.nan if loss is None else loss for step, loss in known}
    return ValidationHistory(fields["of"], losses)


def best_checkpoint(paths: RunPaths[Any]) -> int | None:
    """The step of the checkpoint of lowest validation loss; None where none was measured."""
    there = [int(path.name) for path in paths.checkpoints.glob("*") if path.name.isdigit()]
    return next(iter(read_history(paths.run).best(there)), None)


def parse_run(text: str) -> tuple[RunPaths[Any], Step | None]:
    """RUN, RUN@STEP or RUN@best: the run, and which of its checkpoints."""
    folder, at, step = text.rpartition("@")
    root: Any = as_path(folder if at and (step == BEST or step.isdigit()) else text)
    if root == as_path(text):
        return RunPaths(root), None
    return RunPaths(root), BEST if step == BEST else int(step)


def parse_step(text: str) -> Step:
    """What `--step` says."""
    if text != BEST and not text.isdigit():
        raise ArgumentTypeError(f"{text}: must be the step of a checkpoint, or best")
    return BEST if text == BEST else int(text)


def _plain(loss: float) -> float | None:
    """JSON has no NaN."""
    return loss if math.isfinite(loss) else None
