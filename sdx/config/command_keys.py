"""Root keys that one command takes beside a run's configuration, and that no run is saved with.

They are typed like any key; `take` separates them from the overrides before these are composed, so
that a command that does not have them can say whose they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hydra.core.override_parser.types import Override

from sdx.config.errors import Problem, nearest
from sdx.config.leaves import Leaf, groups, leaves, leaves_of
from sdx.config.overrides import parse, type_fault
from sdx.config.schema import option


class Report(Enum):
    text = "text"
    json = "json"


class OptimizationLevel(Enum):
    """How hard XLA tries, in JAX's words (jax_optimization_level)."""

    default = "default"
    O0 = "O0"
    O1 = "O1"
    O2 = "O2"
    O3 = "O3"


@dataclass
class PlanKeys:
    """What sdx.plan is asked for."""

    compile: bool = option(
        False,
        "Compile the very programs of the run for its described chips; needs sdx's extra `plan`.",
        identity=False,
    )
    report: Report = option(
        Report.text, "A table for people, or one line of JSON for machines.", identity=False
    )
    optimization_level: OptimizationLevel = option(
        OptimizationLevel.O0,
        "XLA's effort; at O0 it takes a tenth of the time and its memory is an upper bound.",
        identity=False,
    )

    @property
    def writes_data(self) -> bool:
        """Whether standard output is for machines."""
        return self.report is Report.json


COMMAND_KEYS: dict[str, type] = {"plan": PlanKeys}


def keys_of(command: str) -> dict[str, Leaf]:
    """The root keys that only `command` takes."""
    return leaves_of(COMMAND_KEYS[command]) if command in COMMAND_KEYS else {}


def owner(key: str) -> str | None:
    """The command whose root key `key` is."""
    return next((command for command in COMMAND_KEYS if key in keys_of(command)), None)


def take(command: str, overrides: Iterable[str]) -> tuple[list[str], Any, list[Problem]]:
    """The overrides that are not `command`'s own, its keys as their dataclass (None where it has
    none), and what is wrong with them or belongs to another command."""
    own, rest, problems = keys_of(command), list[str](), list[Problem]()
    values: dict[str, Any] = {}
    for text in overrides:
        key, _, shown = text.partition("=")
        name = key.lstrip("+~")
        if name not in own:
            problem = _foreign(command, name, shown, own)
            rest += [] if problem else [text]
            problems += [problem] if problem else []
            continue
        problem, value = _read(own[name], key, text, shown)
        problems += [problem] if problem else []
        values[name] = value
    if problems or not own:
        return rest, COMMAND_KEYS[command]() if own else None, problems
    return rest, COMMAND_KEYS[command](**values), []


def _read(leaf: Leaf, typed: str, text: str, shown: str) -> tuple[Problem | None, Any]:
    if typed != leaf.path:
        fix = f"write {leaf.path}={shown or '…'}"
        return Problem(typed, shown, "the key is there, it is set", fix), None
    override = parse(text)
    if isinstance(override, Problem):
        return override, None
    if override.is_sweep_override():
        return Problem(typed, shown, "is one for all jobs and takes one value"), None
    return _convert(leaf, override, shown)


def _convert(leaf: Leaf, override: Override, shown: str) -> tuple[Problem | None, Any]:
    got = override.value()
    command = owner(leaf.path)
    assert command is not None
    if fault := type_fault(leaf, got, shown, COMMAND_KEYS[command]):
        return fault, None
    return None, leaf.kind[str(got)] if issubclass(leaf.kind, Enum) else leaf.kind(got)


def _foreign(command: str, name: str, shown: str, own: dict[str, Leaf]) -> Problem | None:
    """Why `name` cannot be typed at `command`, where that has to do with commands' own keys."""
    if (whose := owner(name)) is not None:
        rule = f"a key of sdx.{whose}, sdx.{command} has none of that name"
        return Problem(name, shown, rule, f"python -m sdx.{whose} … {name}={shown}")
    known = {*leaves(), *groups(), *own}
    if "." in name or "/" in name or name in known:
        return None
    near = nearest(name, known)
    if near not in own:
        return None
    return Problem(name, shown, "unknown key", f"did you mean {near}?")
