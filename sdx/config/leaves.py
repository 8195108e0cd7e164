"""The schema as a flat table: every key by its dotted path, with type, default and metadata.

Everything that speaks about keys in general (checks, errors, identity, reference, help) walks the
schema here.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import MISSING

from sdx.config.schema import Config, OnResume


@dataclass(frozen=True)
class Leaf:
    """One key. `kind` is its type without `None`; of lists `element` is the type of an item."""

    path: str
    kind: type
    element: type | None
    optional: bool
    default: Any
    help: str
    unit: str | None
    at_least: float | None
    at_most: float | None
    above: float | None
    below: float | None
    identity: bool
    on_resume: OnResume

    @property
    def required(self) -> bool:
        return self.default == MISSING

    @property
    def choices(self) -> list[str]:
        """Names an enum key accepts; empty for other keys."""
        kind = self.element or self.kind
        return [member.name for member in kind] if issubclass(kind, Enum) else []

    @property
    def type_name(self) -> str:
        """The type as a person reads it: `a whole number`, `a list of texts`, `text, or null`."""
        names = {
            str: "text",
            bool: "true or false",
            float: "a number",
            int: "a whole number",
            dict: "a mapping such as {name: value}",
        }
        kind = self.element or self.kind
        name = names.get(kind, "one of " + ", ".join(self.choices))
        if self.element:
            items = {int: "whole numbers", str: "texts"}.get(kind, ", ".join(self.choices))
            name = f"a list of {items}"
        return f"{name}, or null" if self.optional else name


@cache
def leaves() -> dict[str, Leaf]:
    """Every key of the schema by path, in the order of the schema."""
    return {leaf.path: leaf for leaf in _walk(Config, "")}


def leaves_of(cls: type) -> dict[str, Leaf]:
    """Every key of another dataclass of options."""
    return {leaf.path: leaf for leaf in _walk(cls, "")}


@cache
def groups() -> dict[str, type]:
    """The dataclass behind every inner path (`train`, `model.unet`, …)."""
    return dict(_walk_groups(Config, ""))


def flatten(config: Config) -> dict[str, Any]:
    """Values of every key by path; enums as their names."""
    return {path: plain(value(config, path)) for path in leaves()}


def value(config: Config, path: str) -> Any:
    """The value at `path`."""
    node: Any = config
    for name in path.split("."):
        node = getattr(node, name)
    return node


def plain(value: Any) -> Any:
    """`value` with enum members as their names, also inside lists and mappings."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return value


def spelled(value: Any) -> str:
    """`value` as a person types it on the command line."""
    value = plain(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}".replace("e-0", "e-").replace("e+0", "e")
    if isinstance(value, list):
        return "[" + ",".join(spelled(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{spelled(item)}" for name, item in value.items()) + "}"
    return str(value)


def _walk(cls: type, prefix: str) -> Iterator[Leaf]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = prefix + field.name
        kind, element, optional = _unwrap(hints[field.name])
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{path}.")
            continue
        metadata = dict(field.metadata)
        yield Leaf(path, kind, element, optional, _default(field), **metadata)


def _walk_groups(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield prefix + name, hint
            yield from _walk_groups(hint, f"{prefix}{name}.")


def _unwrap(hint: Any) -> tuple[type, type | None, bool]:
    optional = False
    if isinstance(hint, types.UnionType):
        (hint,) = [member for member in typing.get_args(hint) if member is not types.NoneType]
        optional = True
    if typing.get_origin(hint) is list:
        return list, typing.get_args(hint)[0], optional
    return typing.get_origin(hint) or hint, None, optional


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
