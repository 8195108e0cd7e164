"""Keys of sweepers and launchers, held against their dataclasses as a run's keys are.

Hydra composes them too, but stops at the first fault, ignores values of a sweep for them in
silence, and ignores all of them without `--multirun`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from sdx.config.check import outside
from sdx.config.errors import Problem, any_of, nearest
from sdx.config.launching import LAUNCHERS, OPTIONS, SWEEPERS, SweeperSettings
from sdx.config.leaves import Leaf, leaves_of, spelled
from sdx.config.overrides import parse, type_fault

GRID = "sdx"
"""The sweeper of every combination."""
_ONE_FOR_ALL = ("run_on", "sweep")


def is_key(text: str) -> bool:
    """Whether an override sets a key of a sweeper or launcher."""
    return text.lstrip("+").startswith(("hydra.launcher.", "hydra.sweeper."))


def is_choice(text: str) -> bool:
    """Whether an override chooses a sweeper or launcher."""
    return text.lstrip("+").partition("=")[0] in ("hydra/launcher", "hydra/sweeper")


def fixed(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Overrides without those that sweep what is one for all jobs, which are faults."""
    kept: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        override = parse(text)
        if isinstance(override, Problem) or not override.is_sweep_override():
            kept.append(text)
            continue
        key = override.key_or_group
        if key in _ONE_FOR_ALL or key.split(".")[0].split("/")[0] == "hydra":
            got = text.partition("=")[2]
            fix = "type a command for each"
            problems.append(Problem(key, got, "is one for all jobs of a sweep", fix))
        else:
            kept.append(text)
    return kept, problems


def without_effect(
    overrides: Sequence[str], rule: str = "without --multirun", fix: str = "add --multirun"
) -> Iterator[Problem]:
    """Hydra ignores launchers and sweepers in silence unless it runs many jobs."""
    for text in overrides:
        if is_key(text) or is_choice(text):
            key, _, got = text.lstrip("+").partition("=")
            yield Problem(key, got, f"has no effect {rule}", fix)


def known_choices(overrides: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Overrides without choices of sweepers and launchers that are not there, which are faults; of
    launchers only sdx's can run its jobs, of sweepers any that hands jobs to launchers."""
    kept: list[str] = []
    problems: list[Problem] = []
    for text in overrides:
        group, _, got = text.lstrip("+").partition("=")
        if not is_choice(text) or got in _options(group):
            kept.append(text)
            continue
        near = nearest(got, _options(group))
        fix = f"did you mean {near}?" if near else f"use {any_of(_options(group))}"
        kind = "launcher of sdx" if group == "hydra/launcher" else "sweeper"
        problems.append(Problem(group, got, f"not a {kind}", fix))
    return kept, problems


def choices_of(hydra: DictConfig) -> dict[str, str]:
    """The options of sweeper and launcher that were composed."""
    return {kind: hydra.runtime.choices[f"hydra/{kind}"] for kind in OPTIONS}


def judge_launcher(choices: Mapping[str, str]) -> Iterator[Problem]:
    """A launcher that is not sdx's, chosen in a file."""
    if choices["launcher"] not in LAUNCHERS:
        fix = f"use {any_of(LAUNCHERS)}"
        yield Problem("hydra/launcher", choices["launcher"], "not a launcher of sdx", fix)


def _options(group: str) -> list[str]:
    if group == "hydra/launcher":
        return [*LAUNCHERS]
    Plugins.instance()  # they tell Hydra of themselves when they are found
    return sorted(Path(name).stem for name in ConfigStore.instance().list(group))


def judge(texts: Sequence[str], choices: Mapping[str, str]) -> Iterator[Problem]:
    """Faults of overrides of `hydra.sweeper.*` and `hydra.launcher.*`, where these are chosen."""
    for text in texts:
        override = parse(text)
        if isinstance(override, Problem):
            yield override
            continue
        kind, _, name = override.key_or_group.removeprefix("hydra.").partition(".")
        cls = OPTIONS[kind].get(choices[kind])
        if cls is None:
            continue  # a sweeper of someone else, whose keys Hydra knows
        yield from _judge_key(override, kind, name, choices[kind], leaves_of(cls), cls)


def for_hydra(text: str) -> str:
    """An override as Hydra takes it, which adds keys to a mapping only where it is told to."""
    parts = text.lstrip("+").partition("=")[0].split(".")
    kind, name = (parts[1], parts[2]) if is_key(text) else ("", "")
    mappings = {
        name
        for cls in OPTIONS.get(kind, {}).values()
        for name, leaf in leaves_of(cls).items()
        if leaf.kind is dict
    }
    return f"++{text.lstrip('+')}" if name in mappings else text


def sweeper_settings(
    hydra: DictConfig, texts: Sequence[str], choices: Mapping[str, str]
) -> SweeperSettings | None:
    """The sweeper's keys with their sound overrides; None where the sweeper is not sdx's."""
    cls = SWEEPERS.get(choices["sweeper"])
    if cls is None:
        return None
    node = OmegaConf.structured(cls)
    known = leaves_of(cls)
    for name, got in hydra.sweeper.items():
        if name in known:
            node[name] = got
    for text in texts:
        override = parse(text)
        if isinstance(override, Override) and override.key_or_group.startswith("hydra.sweeper."):
            node[override.key_or_group.removeprefix("hydra.sweeper.")] = override.value()
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, SweeperSettings)
    return settings


def _judge_key(
    override: Override, kind: str, name: str, chosen: str, known: Mapping[str, Leaf], cls: type
) -> Iterator[Problem]:
    path, got = f"hydra.{kind}.{name}", override.value()
    shown = (override.input_line or "").partition("=")[2]
    mapping, _, below = name.partition(".")
    if name not in known and below and mapping in known and known[mapping].kind is dict:
        if name.startswith("params."):
            yield Problem(path, shown, "is for files in conf/sweep", f"type {below}={shown}")
        return
    if name not in known:
        yield Problem(path, shown, *_unknown(kind, name, chosen, known))
    elif fault := type_fault(known[name], got, shown, cls):
        yield Problem(path, shown, fault.rule, _placed(fault.fix, name, path))
    elif isinstance(got, int | float) and (rule := outside(known[name], got)):
        yield Problem(path, spelled(got), rule)


def _placed(fix: str | None, name: str, path: str) -> str | None:
    return None if fix is None else fix.replace(f"{name}=", f"{path}=")


def _unknown(kind: str, name: str, chosen: str, known: Mapping[str, Any]) -> tuple[str, str | None]:
    owners = [other for other, cls in OPTIONS[kind].items() if name in leaves_of(cls)]
    if owners:
        rule = f"a key of hydra/{kind}={any_of(owners)}, here it is {chosen}"
        return rule, "choose another run_on" if kind == "launcher" else None
    near = nearest(name, known)
    return "unknown key", f"did you mean hydra.{kind}.{near}?" if near else None
