"""What a person typed, held against the schema one override at a time.

Hydra stops at the first fault and says little about it; here each override is parsed and judged by
itself, so that all faults can be listed, and only the sound ones are composed.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sdx.config import peers
from sdx.config.errors import Problem, any_of, nearest
from sdx.config.folders import group_options
from sdx.config.launching import OPTIONS
from sdx.config.leaves import Leaf, groups, leaves, leaves_of, spelled
from sdx.config.schema import ActivationsDtype, Config, WeightsDtype

_HALF = {"float16", "fp16", "half"}


@dataclass
class Inspected:
    """Overrides after inspection.

    `sound` are those to compose: `choices` choose options of groups, `values` are what the others
    set. `problems` are the faults of the rest.
    """

    sound: list[str] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    has_bad_choice: bool = False  # a group option was refused: rules across keys would mislead

    @property
    def keys(self) -> list[str]:
        return list(self.values)


def inspect(
    overrides: Sequence[str], folders: Sequence[Path], only: Collection[str] | None = None
) -> Inspected:
    """Judge every override; `folders` hold the options of groups.

    `only` names the groups that may be chosen from, if not all: a saved configuration has made its
    choices.
    """
    result = Inspected()
    options = group_options(folders)
    options = {group: options[group] for group in only} if only is not None else options
    for text in overrides:
        override = parse(text)
        if isinstance(override, Problem):
            result.problems.append(_answered(override, options, "…"))
            continue
        faults = list(_judge(override, options))
        result.problems += faults
        is_choice = _is_group(override, options)
        result.has_bad_choice |= bool(faults) and is_choice
        if faults:
            continue
        key, got = override.key_or_group, override.value()
        if is_choice and got is None:  # Hydra takes no null for a group: what was chosen is undone
            result.choices.pop(key, None)
            result.sound = [one for one in result.sound if one.partition("=")[0] != key]
            continue
        if is_choice:
            result.choices[key] = str(got)
        elif (mapping := _mapping(key)) is not None:
            _set_below(result.values.setdefault(mapping, {}), key[len(mapping) + 1 :], got)
            text = f"++{text.lstrip('+')}"  # Hydra adds no keys to a mapping otherwise
        else:
            result.values |= dict(_items(key, got))
        result.sound.append(text)
    return result


def parse(text: str) -> Override | Problem:
    """`text` as Hydra's grammar reads it."""
    if "=" not in text and not text.startswith("~"):
        return _not_an_override(text)
    try:
        return _parser().parse_override(text)
    except HydraException as error:
        key, _, got = text.partition("=")
        reason = str(error).splitlines()[0]
        quoted = '["…"]' if got.startswith("[") else '"…"'
        fix = f"quote values with special characters: '{key}={quoted}'"
        return Problem(key, got, f"not readable ({reason})", fix)


def explain(error: Exception) -> Problem:
    """What Hydra or OmegaConf stopped at, as a problem; for faults that lie in YAML files."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, MissingConfigException):
            name = cause.missing_cfg_file or "conf"
            options = [option for option in cause.options or []]
            fix = f"use {any_of(options)}" if options else None
            return Problem(name, None, "no such option", fix)
    for cause in chain:
        if isinstance(cause, OmegaConfBaseException):
            path = cause.full_key or "conf"
            if isinstance(cause, ConfigKeyError) or "not in" in str(cause.msg):
                near = nearest(path, {*leaves(), *groups(), *_launching_keys()})
                return Problem(path, None, "unknown key", f"did you mean {near}?" if near else None)
            return Problem(path, None, str(cause.msg).splitlines()[0].rstrip("."))
    return Problem("conf", None, " ".join(str(error).split()).rstrip("."))


def type_fault(leaf: Leaf, got: Any, shown: str, root: type = Config) -> Problem | None:
    """Whether OmegaConf would refuse `got` for this key of `root`."""
    group, _, name = leaf.path.rpartition(".")
    node = OmegaConf.structured(groups()[group] if group else root)
    assert isinstance(node, DictConfig)
    try:
        node[name] = got
    except OmegaConfBaseException:
        is_dtype = leaf.kind in {WeightsDtype, ActivationsDtype}
        if is_dtype and str(got).lower() in _HALF:
            rule = "float16 overflows without loss scaling; bfloat16 has float32's range in 2 bytes"
            return Problem(leaf.path, shown, rule, f"use {leaf.path}=bfloat16")
        return Problem(leaf.path, shown, f"must be {leaf.type_name}", _type_fix(leaf, got))
    return None


def _judge(override: Override, options: dict[str, list[str]]) -> Iterator[Problem]:
    key = override.key_or_group
    if override.is_sweep_override():
        got = (override.input_line or "").partition("=")[2]
        fix = "add --multirun to run them all, or quote a value that holds a comma"
        yield _answered(Problem(key, got, "several values", fix), options, f'"{got}"')
    elif key.split(".")[0].split("/")[0] == "hydra":
        return
    elif override.package is not None or (override.is_delete() and key in _all_keys()):
        yield Problem(
            _typed_key(override), None, "keys are set, not moved or deleted", f"use {key}=…"
        )
    elif _is_group(override, options):
        yield from _judge_choice(override, options[key])
    elif key in group_options([]) and not isinstance(override.value(), dict):
        rule = "a saved configuration has made this choice"
        fix = f"set its keys ({key}.…); {any_of(options)} may be chosen anew"
        yield Problem(key, str(override.value()), rule, fix)
    else:
        for path, got in _items(key, override.value()):
            yield from _judge_value(override, path, got, options)


def _judge_choice(override: Override, options: list[str]) -> Iterator[Problem]:
    group, got = override.key_or_group, override.value()
    if override.is_add() or override.is_delete():
        yield Problem(_typed_key(override), str(got), "a group has one option", f"use {group}=…")
    elif got is None and group in {"experiment", "sweep", "debug"}:
        return
    elif not isinstance(got, str) or got not in options:
        near = nearest(str(got), options)
        fix = f"use {any_of(options)}"
        fix = f"did you mean {group}={near}? Options: {', '.join(options)}" if near else fix
        yield Problem(group, str(got), "no such option", fix)


def _judge_value(
    override: Override, path: str, got: Any, options: dict[str, list[str]]
) -> Iterator[Problem]:
    leaf = leaves().get(path)
    shown = spelled(got)
    if path == override.key_or_group:
        shown = (override.input_line or "").partition("=")[2]
    if leaf is None:
        if _is_list_item(path) or _mapping(path) is not None:
            return
        yield _unknown_key(override, path, shown, options)
    elif override.is_add() and not override.is_force_add():
        yield Problem(f"+{path}", shown, "the key exists already", f"drop the +: {path}={shown}")
    elif isinstance(got, str) and "${" in got:
        return
    elif got == "???":
        yield Problem(path, got, "a value is needed", f"it takes {leaf.type_name}")
    elif fault := type_fault(leaf, got, shown):
        yield fault


def _unknown_key(
    override: Override, path: str, shown: str, options: dict[str, list[str]]
) -> Problem:
    typed = _typed_key(override, path)
    if path in groups():
        example = next(key for key in leaves() if key.startswith(f"{path}."))
        return Problem(typed, shown, "this is a group of keys", f"set one, such as {example}=…")
    if path.split(".")[0] not in groups() and (known := peers.answer(path, shown)):
        return Problem(typed, shown, *known)
    near = _nearest_key(path, options)
    fix = f"did you mean {near}?" if near else "python -m sdx.train --help shows where to look"
    return Problem(typed, shown, "unknown key", fix, suggested=near)


def _answered(problem: Problem, options: dict[str, list[str]], value: str) -> Problem:
    """`problem`, or where its key is a peer's what to type instead: YAML's lists of words and
    mappings are not Hydra's, and whoever pastes them asks for the key. `value` is what to show."""
    if problem.path.split(".")[0] in {*groups(), *options}:
        return problem
    known = peers.answer(problem.path, value)
    return Problem(problem.path, problem.got, *known) if known else problem


def _nearest_key(path: str, options: dict[str, list[str]]) -> str | None:
    """The key meant by `path`: the same name in another group, else the nearest in spelling."""
    name = path.rpartition(".")[2]
    same = [key for key in leaves() if key.rpartition(".")[2] == name]
    if len(same) == 1:
        return same[0]
    root = path.split(".")[0]
    if root not in groups() and (near_root := nearest(root, {*groups(), *options})):
        path = ".".join([near_root, *path.split(".")[1:]])
        if path in leaves() or path in options:
            return path
    group = path.rpartition(".")[0]
    if group and group not in groups():
        return None
    siblings = {key.rpartition(".")[2]: key for key in leaves() if key.rpartition(".")[0] == group}
    by_name = {key.rpartition(".")[2]: key for key in leaves()}
    near = nearest(name, siblings)
    return siblings[near] if near else by_name.get(nearest(name, by_name) or "")


def _type_fix(leaf: Leaf, got: Any) -> str | None:
    if leaf.element and not isinstance(got, list):
        return f"write {leaf.path}=[{spelled(got)}]"
    if leaf.kind is int and isinstance(got, float) and got.is_integer():
        return f"use {leaf.path}={int(got)}"
    names = got if isinstance(got, list) else [got]
    wrong = [name for name in names if str(name) not in leaf.choices]
    near = nearest(str(wrong[0]), leaf.choices) if wrong else None
    return f"did you mean {near}?" if near else None


def _items(path: str, got: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of an override; a mapping given to a group is taken apart."""
    if isinstance(got, dict) and path in groups():
        for name, item in got.items():
            yield from _items(f"{path}.{name}", item)
    else:
        yield path, got


def _is_group(override: Override, options: dict[str, list[str]]) -> bool:
    key = override.key_or_group
    return key in options and not isinstance(override.value(), dict)


def _is_list_item(path: str) -> bool:
    parent, _, index = path.rpartition(".")
    return index.isdigit() and parent in leaves() and leaves()[parent].element is not None


def _launching_keys() -> set[str]:
    """Keys of all sweepers and launchers, as files may spell them."""
    return {
        f"hydra.{kind}.{name}"
        for kind, options in OPTIONS.items()
        for cls in options.values()
        for name in leaves_of(cls)
    }


def _all_keys() -> set[str]:
    return {*leaves(), *groups()}


def _typed_key(override: Override, path: str | None = None) -> str:
    prefix = {True: "~"}.get(override.is_delete(), "")
    if override.is_add():
        prefix = "++" if override.is_force_add() else "+"
    package = f"@{override.package}" if override.package is not None else ""
    return prefix + (path or override.key_or_group) + package


def _not_an_override(text: str) -> Problem:
    near = nearest(text, leaves())
    fix = f"did you mean {near}=…?" if near else "write KEY=VALUE"
    return Problem(text, None, "not KEY=VALUE", fix)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _mapping(path: str) -> str | None:
    """The key of mapping type that `path` is or lies below, if any."""
    names = path.split(".")
    parents = (".".join(names[:length]) for length in range(1, len(names) + 1))
    return next((key for key in parents if key in leaves() and leaves()[key].kind is dict), None)


def _set_below(mapping: dict[str, Any], path: str, got: Any) -> None:
    """Sets the item at `path` of a mapping, or with no path those of `got`."""
    name, _, rest = path.partition(".")
    if not name:
        mapping |= got
    elif rest:
        _set_below(mapping.setdefault(name, {}), rest, got)
    else:
        mapping[name] = got
