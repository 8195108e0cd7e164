"""From overrides to one typed `Config`: by Hydra from `conf/`, or from a saved file without Hydra.

Every fault is collected before anything is reported: overrides are first held against the schema
one by one, the good ones are composed, and the result is checked as a whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdx.config.check import check, check_given
from sdx.config.errors import ConfigError, Problem, nearest
from sdx.config.folders import CONF, option_folders, reach_launchers
from sdx.config.leaves import groups, leaves
from sdx.config.overrides import Inspected, explain, inspect
from sdx.config.schema import SCHEMA_VERSION, Config

__all__ = ["CONF", "compose", "from_saved", "to_yaml"]

Adjust = Callable[[Config], Config]

_PLACE = ("hardware", "mesh", "attention", "xla")  # hardware's presets choose the others

# What a saved configuration of each older schema_version must go through, in order.
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def compose(
    overrides: Sequence[str], *, config_dir: Path | None = None, adjust: Adjust | None = None
) -> Config:
    """The configuration that `overrides` choose; raises ConfigError with everything that is wrong.

    `config_dir` holds more options for the groups of `conf/`; `./conf` is searched as well.
    `adjust` comes before the check of the whole.
    """
    composed = compose_with_hydra(overrides, config_dir=config_dir, adjust=adjust)
    if composed.problems or composed.config is None:
        raise ConfigError(composed.problems)
    return composed.config


@dataclass(frozen=True)
class Composed:
    """What overrides came to, as far as that went: nothing is wrong where `problems` is empty."""

    config: Config | None
    hydra: DictConfig | None
    """Hydra's own configuration beside it: sweeper, launcher, mode."""
    problems: list[Problem]


def compose_with_hydra(
    overrides: Sequence[str], *, config_dir: Path | None = None, adjust: Adjust | None = None
) -> Composed:
    """As `compose`, with Hydra's own configuration and without raising."""
    folders = option_folders(config_dir)
    inspected = inspect(overrides, folders)
    problems = [*_shadowing(folders), *inspected.problems]
    with composing(folders):
        config, hydra, found = _composed([*inspected.sound, *search_path(folders)])
    problems += found
    if config is not None and adjust is not None:
        config = adjust(config)
    if config is not None and not inspected.has_bad_choice:
        suggested = {problem.suggested for problem in problems}
        faults = [*check(config), *check_given(config, inspected.keys)]
        problems += [fault for fault in faults if fault.path not in suggested]
    return Composed(config, hydra, problems)


@runtime_checkable
class SavedPlace(Protocol):
    """What is asked of a saved configuration's path: a local one, or one in an object store."""

    @property
    def name(self) -> str: ...

    def __truediv__(self, name: str, /) -> "SavedPlace": ...

    def is_dir(self) -> bool: ...

    def is_file(self) -> bool: ...

    def read_text(self, encoding: str) -> str: ...


def from_saved(
    path: SavedPlace, overrides: Sequence[str] = (), *, adjust: Adjust | None = None
) -> Config:
    """The configuration saved at `path` (a run folder or a YAML file), with `overrides` on top.

    `adjust` comes before the check of the whole.
    No Hydra, unless an override chooses another place to run: `hardware=`, `mesh=`, `attention=`.
    """
    file = path / "config.yaml" if path.is_dir() else path
    saved = _load_saved(file)
    folders = option_folders()
    inspected = inspect(overrides, folders, only=_PLACE)
    problems = [*_unknown(OmegaConf.create(saved), file.name), *inspected.problems]
    if problems:
        raise ConfigError(problems)
    try:
        node = OmegaConf.merge(OmegaConf.structured(Config), saved, _place(inspected, folders))
        assert isinstance(node, DictConfig)
        for key, item in inspected.values.items():
            OmegaConf.update(node, key, item)
    except OmegaConfBaseException as error:
        raise ConfigError([explain(error)]) from None
    config, problems = typed(node)
    if config is not None and adjust is not None:
        config = adjust(config)
    if config is not None:
        problems = [*check(config), *check_given(config, inspected.keys)]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def to_yaml(config: Config) -> str:
    """`config` as YAML that `from_saved` reads; enum members by name, every key spelled out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def typed(node: DictConfig) -> tuple[Config | None, list[Problem]]:
    """The plain dataclasses of a composed node, or what keeps it from becoming them."""
    try:
        problems = list(_missing(node))
        if problems:
            return None, problems
        config = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        return None, [explain(error)]
    assert isinstance(config, Config)
    return config, []


@contextmanager
def composing(folders: Sequence[Path]) -> Iterator[None]:
    """Hydra ready to compose from `folders`, and its global state as it was afterwards."""
    register()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folders[0]), job_name="sdx"):
            yield
    finally:
        GlobalHydra.instance().hydra = before


def search_path(folders: Sequence[Path]) -> list[str]:
    """The override that makes Hydra look into the user's folders as well."""
    quoted = (str(folder).replace("'", "\\'") for folder in folders[1:])
    more = ",".join(f"'file://{folder}'" for folder in quoted)
    return [f"hydra.searchpath=[{more}]"] if more else []


def register() -> None:
    """Tell Hydra the schema, and where to find the sweepers and launchers."""
    reach_launchers()
    ConfigStore.instance().store(name="base_config", node=Config)


def _composed(
    overrides: Sequence[str],
) -> tuple[Config | None, DictConfig | None, list[Problem]]:
    try:
        node = hydra_compose("config", list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        return None, None, [explain(error)]
    hydra = node.hydra
    with open_dict(node):
        del node["hydra"]
    config, problems = typed(node)
    return config, hydra, problems


def _place(inspected: Inspected, folders: Sequence[Path]) -> dict[str, Any]:
    """The groups that another choice of where to run replaces in a saved configuration."""
    if not inspected.choices:
        return {}
    with composing(folders):
        choices = [f"{group}={option}" for group, option in inspected.choices.items()]
        node = hydra_compose(config_name="config", overrides=[*choices, *search_path(folders)])
    replaced = _PLACE if "hardware" in inspected.choices else inspected.choices
    return {group: node[group] for group in replaced}


def _shadowing(folders: Sequence[Path]) -> Iterator[Problem]:
    """Options of the user's folders that carry the name of one of ours and would never be read."""
    ours = sorted(str(file.relative_to(CONF)) for file in CONF.glob("*/*.yaml"))
    for folder in folders[1:]:
        for name in [name for name in ours if (folder / name).is_file()]:
            if (folder / name).read_bytes() == (CONF / name).read_bytes():
                continue  # a checkout beside an installed sdx
            rule = "sdx has an option of that name, this one would never be read"
            yield Problem(str(folder / name), None, rule, "rename the file")


def _unknown(node: Any, source: str) -> Iterator[Problem]:
    """Keys of a saved file that the schema does not have, all of them."""
    known = {*leaves(), *groups()}
    for path in _paths(node):
        if path not in known:
            near = nearest(path, known)
            fix = f"did you mean {near}?" if near else None
            yield Problem(path, None, f"unknown key in {source}", fix)


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all keys of `node`, not going below a key the schema does not have as a group."""
    for key in node:
        path = f"{prefix}{key}"
        yield path
        if path in groups() and not OmegaConf.is_missing(node, key):
            yield from _paths(node[key], f"{path}.")


def _missing(node: DictConfig) -> Iterator[Problem]:
    for path in sorted(OmegaConf.missing_keys(node)):
        yield Problem(path, None, "missing", f"set it in conf/ or pass {path}=…")


def _load_saved(file: SavedPlace) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError([Problem("--from", str(file), "no such file")])
    try:
        content = OmegaConf.to_container(OmegaConf.load(StringIO(file.read_text("utf-8"))))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([Problem("--from", str(file), f"not readable ({reason})")]) from None
    if not isinstance(content, dict):
        raise ConfigError([Problem("--from", str(file), "not a saved configuration")])
    saved = {str(key): item for key, item in content.items()}
    version = saved.get("schema_version", SCHEMA_VERSION)
    if version not in {*MIGRATIONS, SCHEMA_VERSION}:
        rule = f"schema_version {version} is not known to this sdx, which writes {SCHEMA_VERSION}"
        raise ConfigError([Problem("--from", str(file), rule, "use the sdx that wrote it")])
    for number in range(version, SCHEMA_VERSION):
        saved = MIGRATIONS[number](saved)
    return {**saved, "schema_version": SCHEMA_VERSION}
