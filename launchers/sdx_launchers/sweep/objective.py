"""What runs are judged by: a column of their metrics.jsonl, and which end of it is good."""

import math
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from sdx.config.errors import Problem

FALLBACK = "loss"
"""Judged by where no run has the metric asked for."""


class Value(NamedTuple):
    """A metric at a step; None where it was not finite."""

    step: int
    value: float | None


@dataclass(frozen=True)
class Objective:
    """`metric`, lowest first; with `is_max` highest first."""

    metric: str
    is_max: bool = False

    @property
    def fallback(self) -> "Objective":
        return replace(self, metric=FALLBACK, is_max=False)

    def key(self, value: float) -> float:
        """For sorting: the better the smaller."""
        return -value if self.is_max else value

    def best(self, values: Iterable[tuple[int, float | None]]) -> Value | None:
        """The best finite one, of equals the first; None without one."""
        finite = [Value(s, v) for s, v in values if v is not None and math.isfinite(v)]
        return min(finite, key=lambda one: self.key(one.value or 0.0), default=None)

    def __str__(self) -> str:
        return f"{self.metric}:{'max' if self.is_max else 'min'}"


def parse_objective(text: str) -> Objective | Problem:
    """METRIC, METRIC:min or METRIC:max, as `hydra.sweeper.objective` says it."""
    metric, _, end = text.partition(":")
    if not metric or end not in ("", "min", "max"):
        fix = "as validation_loss:min or adherence:max"
        allowed = "must be METRIC, METRIC:min or METRIC:max"
        return Problem("hydra.sweeper.objective", text, allowed, fix)
    return Objective(metric, end == "max")


def objective_argument(text: str) -> Objective:
    """What `--objective` says."""
    parsed = parse_objective(text)
    if isinstance(parsed, Problem):
        raise ArgumentTypeError(f"{text}: {parsed.rule}, {parsed.fix}")
    return parsed
