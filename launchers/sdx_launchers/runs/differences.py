"""The fewest keys that tell runs apart: those typed for them, and others where these do not."""

from collections.abc import Hashable, Iterable, Sequence

from sdx.config.leaves import spelled
from sdx_launchers.runs.facts import RunFacts

_HIDDEN = ("run.name", "run.output_dir")  # every run has its own
_CHOICES = ("name", "kind")
"""Keys by which an option of a group is known."""
_COMMAND_LINE = "+~"


def differing_keys(runs: Sequence[RunFacts]) -> list[str]:
    """Keys whose values differ, those typed first, in the order they were typed in.

    Of the others one that follows from those before it is left out: with `model` all of it is told.
    """
    told = [run for run in runs if run.config or run.overrides]
    known = [run for run in runs if run.config]
    typed = dict.fromkeys(key for run in told for key in _typed(run) if key not in _HIDDEN)
    leaves = dict.fromkeys(key for run in known for key in run.config if key not in _HIDDEN)
    choices = dict.fromkeys(key for key in leaves if key.rpartition(".")[2] in _CHOICES)
    keys = [key for key in typed if not _follows(key, (), told)]
    for key in choices | leaves:
        if key not in typed and not _follows(key, keys, known):
            keys.append(key)
    return keys


def value_of(run: RunFacts, key: str) -> str | None:
    """The value of a key or the option of a group, as a person types it; None where it has none."""
    typed = _typed(run)
    if key in typed:  # before the configuration, where a batch size may be resolved to another
        return spelled(_number(typed[key]))
    if key in run.config:
        return spelled(run.config[key])
    choices = (run.config.get(f"{key}.{name}") for name in _CHOICES)
    return next((spelled(choice) for choice in choices if choice is not None), None)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Every key by as much of its end as no other has."""
    keys = list(keys)
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        names[key] = next(
            (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1),
            key,
        )
    return names


def _number(typed: str) -> float | str:
    """A number as a configuration holds it, however it was typed."""
    try:
        return float(typed)
    except ValueError:
        return typed


def _typed(run: RunFacts) -> dict[str, str]:
    pairs = (text.lstrip(_COMMAND_LINE).partition("=") for text in run.overrides)
    return {key: value for key, _, value in pairs}


def _follows(key: str, keys: Sequence[str], runs: Sequence[RunFacts]) -> bool:
    """Whether runs that agree in `keys` agree in `key`."""
    seen: dict[Hashable, str | None] = {}
    for run in runs:
        value = value_of(run, key)
        if seen.setdefault(tuple(value_of(run, other) for other in keys), value) != value:
            return False
    return True
