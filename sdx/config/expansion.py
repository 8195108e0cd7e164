"""The jobs of a sweep, as overrides: every combination of the values given for each key.

Values come from the command line (`optimizer.lr=1e-5,5e-6`, all of Hydra's grammar) and from a
named sweep's `hydra.sweeper.params`, which the command line adds to or replaces. Keys tied together
by `hydra.sweeper.zip` change together.
"""

import itertools
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.types import Glob, Override

from sdx.config.errors import Problem, any_of, nearest
from sdx.config.folders import group_options, option_folders
from sdx.config.overrides import parse

Values = list[str]
"""Overrides of one key, one for each of its values."""


def expand(
    params: Mapping[str, str], typed: Sequence[str], zipped: Sequence[str]
) -> tuple[list[list[str]], list[Problem]]:
    """The overrides of each job, and what is wrong with them; `typed` holds no key of Hydra."""
    problems: list[Problem] = []
    keys: dict[str, Values] = {}
    for text in [*(f"{key}={values}" for key, values in params.items()), *typed]:
        override = parse(text)
        if isinstance(override, Problem):
            problems.append(override)
            continue
        values, fault = _values(override)
        problems += [fault] if fault else []
        if override.key_or_group in keys:  # the last one counts, as anywhere
            del keys[override.key_or_group]
        keys[override.key_or_group] = values
    ties, faults = tied(keys, zipped)
    problems += faults
    if problems:
        return [], problems
    axes = [list(zip(*(keys[key] for key in tie), strict=True)) for tie in ties]
    return [list(itertools.chain(*combined)) for combined in itertools.product(*axes)], []


def _values(override: Override) -> tuple[Values, Problem | None]:
    if not override.is_sweep_override():
        return [override.input_line or ""], None
    if not override.is_discrete_sweep():
        got = (override.input_line or "").partition("=")[2]
        fix = "name the values, or search: hydra/sweeper=sdx_search"
        return [], Problem(override.key_or_group, got, "has no list of values", fix)
    return listed(override)


def listed(override: Override) -> tuple[Values, Problem | None]:
    """The overrides of each value of a list, a range or a pattern of options."""
    key, sweep = override.get_key_element(), override.value()
    if not isinstance(sweep, Glob):
        return [f"{key}={value}" for value in override.sweep_string_iterator()], None
    options = group_options(option_folders()).get(override.key_or_group, [])
    found = [f"{key}={name}" for name in sweep.filter(sorted(options))]
    if found:
        return found, None
    got = (override.input_line or "").partition("=")[2]
    rule, fix = "no option has such a name", f"there are {any_of(sorted(options))}"
    return [], Problem(override.key_or_group, got, rule, fix if options else None)


def tied(
    keys: Mapping[str, Values], zipped: Sequence[str]
) -> tuple[list[list[str]], list[Problem]]:
    """Keys that change together, each tie where the first of them stands."""
    problems: list[Problem] = []
    ties = {key: [key] for key in keys}
    for text in zipped:
        names = text.split("+")
        fault = _tie_fault(text, names, keys, ties)
        if fault is not None:
            problems.append(fault)
            continue
        first = min(names, key=list(keys).index)
        ties = {key: names if key == first else tie for key, tie in ties.items()}
        for name in names:
            if name != first:
                del ties[name]
    return list(ties.values()), problems


def _tie_fault(
    text: str, names: Sequence[str], keys: Mapping[str, Values], ties: Mapping[str, list[str]]
) -> Problem | None:
    path = "hydra.sweeper.zip"
    if len(names) < 2 or len(set(names)) < len(names):
        return Problem(path, f"[{text}]", "ties at least two keys", f"write {path}=[KEY+KEY]")
    unknown = [name for name in names if name not in keys]
    if unknown:
        near = nearest(unknown[0], keys)
        fix = f"did you mean {near}?" if near else f"give it values: {unknown[0]}=…,…"
        return Problem(path, f"[{text}]", f"{any_of(unknown)} is not swept", fix)
    if any(ties.get(name) != [name] for name in names):
        return Problem(path, f"[{text}]", "a key can be tied once")
    if len({len(keys[name]) for name in names}) > 1:
        lengths = " and ".join(f"{name} has {len(keys[name])}" for name in names)
        rule = f"keys that change together need as many values: {lengths}"
        return Problem(path, f"[{text}]", rule)
    return None
