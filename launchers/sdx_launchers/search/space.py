"""What a search may choose: intervals, ranges and lists of values, typed in Hydra's own grammar.

optimizer.lr=tag(log,interval(1e-6,1e-3))   any number between, even on a logarithmic scale
optimizer.b1=interval(0.8,0.95)             any number between; whole ones for whole keys
lr_schedule.warmup_steps=range(0,500,50)    the values a grid would visit
optimizer=adamw,lion                        one of these
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from sdx.config.errors import Problem
from sdx.config.expansion import Values, listed, tied
from sdx.config.leaves import groups, leaves, spelled
from sdx.config.overrides import parse

_MOST_CORNERS = 64
_LOG = "log"
Value: TypeAlias = float | int | str


@dataclass(frozen=True)
class Numbers:
    """Numbers of one key from `low` to `high`, both among them; `step` None means any between."""

    name: str
    low: float
    high: float
    step: float | None
    is_log: bool
    is_whole: bool

    @property
    def ends(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    def overrides(self, value: Value) -> list[str]:
        return [f"{self.name}={value!r}"]

    def describe(self) -> str:
        kind = "whole numbers" if self.is_whole else "numbers"
        steps = "" if self.step in (None, 1) else f" in steps of {spelled(self.step)}"
        scale = ", logarithmic" if self.is_log else ""
        return f"{self.name}: {kind} from {spelled(self.low)} to {spelled(self.high)}{steps}{scale}"


@dataclass(frozen=True)
class Choices:
    """Values of one key, or of keys that change together, by what each of them sets."""

    name: str
    options: Mapping[str, tuple[str, ...]]

    @property
    def ends(self) -> tuple[Value, ...]:
        return tuple(self.options)

    def overrides(self, value: Value) -> list[str]:
        return list(self.options[str(value)])

    def describe(self) -> str:
        return f"{self.name}: {', '.join(self.options)}"


Axis: TypeAlias = Numbers | Choices


@dataclass(frozen=True)
class Space:
    """All that is searched, and the overrides that every trial has."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    def overrides(self, values: Mapping[str, Value]) -> list[str]:
        """Those of the trial with these values, by name of the axis."""
        own = (text for axis in self.axes for text in axis.overrides(values[axis.name]))
        return [*self.fixed, *own]

    def corners(self) -> Iterator[list[str]]:
        """Overrides of trials at the ends of every axis: in every combination where these are few,
        else one axis at a time."""
        if math.prod(len(axis.ends) for axis in self.axes) <= _MOST_CORNERS:
            combined = itertools.product(*(axis.ends for axis in self.axes))
        else:
            first = [axis.ends[0] for axis in self.axes]
            combined = (
                [*first[:number], end, *first[number + 1 :]]
                for number, axis in enumerate(self.axes)
                for end in axis.ends[number > 0 :]  # the first of all is met once
            )
        for values in combined:
            names = (axis.name for axis in self.axes)
            yield self.overrides(dict(zip(names, values, strict=True)))

    def describe(self) -> str:
        return "\n".join(axis.describe() for axis in self.axes)


def read_space(
    params: Mapping[str, str], typed: Sequence[str], zipped: Sequence[str]
) -> tuple[Space, list[Problem]]:
    """The space of a named sweep's `params` and what was `typed`, without keys of Hydra, and what
    is wrong with it. What is typed adds to the named sweep, or replaces what that says of a key."""
    problems: list[Problem] = []
    found: dict[str, Override] = {}
    for text in [*(f"{key}={given}" for key, given in params.items()), *typed]:
        override = parse(text)
        if isinstance(override, Problem):
            problems.append(override)
            continue
        found.pop(override.key_or_group, None)
        found[override.key_or_group] = override
    fixed = [each.input_line or "" for each in found.values() if not each.is_sweep_override()]
    swept = {key: each for key, each in found.items() if each.is_sweep_override()}
    axes, faults = _axes(swept, zipped)
    if not swept and not problems:
        fix = "give a key interval(LOW,HIGH) or several values"
        faults.append(Problem("hydra/sweeper", "sdx_search", "nothing is searched", fix))
    return Space(tuple(fixed), tuple(axes)), [*problems, *faults]


def _axes(swept: Mapping[str, Override], zipped: Sequence[str]) -> tuple[list[Axis], list[Problem]]:
    """An axis for each key, or for the keys that change together where the first of them stands."""
    problems: list[Problem] = []
    values: dict[str, Values] = {}
    axes: dict[str, Axis] = {}
    for key, override in swept.items():
        sweep = override.value()
        if not isinstance(sweep, IntervalSweep | RangeSweep):
            values[key], fault = listed(override)
            problems += [fault] if fault else []
            continue
        numbers = _numbers(override, sweep, override.get_key_element())
        if isinstance(numbers, Problem):
            problems.append(numbers)
        else:
            axes[key] = numbers
    ties, faults = tied(values, zipped)
    for keys in ties:
        joined = zip(*(values[key] for key in keys), strict=True)
        options = {_label(texts): tuple(texts) for texts in joined}
        axes[keys[0]] = Choices("+".join(keys), options)
    return [axes[key] for key in swept if key in axes], [*problems, *faults]


def _label(texts: Sequence[str]) -> str:
    """The value of one key as typed; keys that change together are spelled out."""
    return texts[0].partition("=")[2] if len(texts) == 1 else " ".join(texts)


def _numbers(override: Override, sweep: IntervalSweep | RangeSweep, name: str) -> Numbers | Problem:
    def wrong(rule: str, fix: str) -> Problem:
        got = (override.input_line or "").partition("=")[2]
        return Problem(override.key_or_group, got, rule, fix)

    if other := sorted(sweep.tags - {_LOG}):
        return wrong(f"has the tag {other[0]}", f"the only tag is {_LOG}")
    leaf = leaves().get(override.key_or_group)
    if override.key_or_group in groups() or (leaf and leaf.kind not in (int, float)):
        return wrong("is not a key of numbers", "list its values: A,B,…")
    is_whole = leaf is not None and leaf.kind is int  # no such key: told with the first corner
    is_log = _LOG in sweep.tags
    if isinstance(sweep, RangeSweep):
        values = [float(f"{number:.12g}") for number in sweep.range()]
        low, high, step = min(values, default=0), max(values, default=-1), abs(sweep.step)
    else:
        assert sweep.start is not None and sweep.end is not None
        low, high, step = sweep.start, sweep.end, 1 if is_whole else None
    if low >= high:
        return wrong("leaves nothing to choose", "give the lower end first, as interval(1,2)")
    if is_whole and any(number != int(number) for number in (low, high, step or 1)):
        return wrong("has ends that are no whole numbers", "round them")
    if is_log and low <= 0:
        return wrong("cannot be logarithmic down to 0 or below", "begin above 0, or drop the tag")
    if is_log and step not in (None, 1):
        return wrong("cannot be logarithmic in steps", "use interval(LOW,HIGH)")
    kind = int if is_whole else float
    return Numbers(name, kind(low), kind(high), step and kind(step), is_log, is_whole)
