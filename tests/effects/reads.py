"""Which keys of a configuration are read, by their full path, while sdx does something with it."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from sdx.config.leaves import groups, leaves
from sdx.config.schema import Config

# They read every key alike, or only to say whether it may be as it is.
IGNORED = ("sdx.config.check", "sdx.config.identity._", "sdx.config.leaves", "sdx.config.schema")

FOR_OTHERS = ("sdx.config.resolve", "sdx.config.check_mesh")


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The keys that sdx reads while the block runs; what copies, compares, saves or checks whole
    configurations does not count."""
    places: dict[type, list[str]] = {}
    for path, cls in {"": Config, **groups()}.items():
        places.setdefault(cls, []).append(path)
    found: set[str] = set()

    def place(config: Any) -> str | None:
        """Where it was read from; a copy is where its class is, if that is at one place only."""
        fields = object.__getattribute__(config, "__dict__")
        [only, *others] = places[type(config)]
        return fields.get("_place", None if others else only)

    def note(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_"):
            return value
        prefix = place(self)
        path = f"{prefix}.{name}" if prefix else name
        if dataclasses.is_dataclass(value):
            object.__getattribute__(value, "__dict__")["_place"] = path
        caller = _caller(sys._getframe(1))
        counts = caller.startswith("sdx.") and not caller.startswith(IGNORED)
        if counts and prefix is not None and path in leaves():
            found.add(path)
        return value

    with pytest.MonkeyPatch.context() as patch:
        for cls in places:
            patch.setattr(cls, "__getattribute__", note)
        yield found


def _caller(frame: FrameType) -> str:
    """The function that wants to know, and its module; some modules ask for others."""
    asked: FrameType | None = frame
    while asked is not None and asked.f_globals.get("__name__") in FOR_OTHERS:
        asked = asked.f_back
    return "" if asked is None else f"{asked.f_globals.get('__name__')}.{asked.f_code.co_name}"
