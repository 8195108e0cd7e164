"""Every key of the schema does what its help says: one row a key, none may be missing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdx.config.leaves import leaves
from sdx.models.networks import make_networks
from sdx.training import program as programs
from tests.effects import (
    architecture,
    cached,
    data,
    noising,
    pictures,
    place,
    runs,
    updates,
    weights,
)
from tests.effects.effect import Case, Effect
from tests.effects.files import make_files

TABLE: list[Effect] = [
    *architecture.EFFECTS,
    *cached.EFFECTS,
    *data.EFFECTS,
    *noising.EFFECTS,
    *pictures.EFFECTS,
    *place.EFFECTS,
    *runs.EFFECTS,
    *weights.EFFECTS,
    *updates.EFFECTS,
]


PENDING: dict[str, str] = {}
"""Keys without a row, and why."""


@pytest.fixture(scope="module", autouse=True)
def networks_once() -> Iterator[None]:
    """Rows that differ in other things share the networks: most of a program's building."""
    made: dict[str, Any] = {}

    def shared(*args: Any, **options: Any) -> Any:
        key = repr((args, sorted(options.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = make_networks(*args, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "make_networks", shared)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Case]:
    """The case of some overrides, made once."""
    cases: dict[tuple[str, ...], Case] = {}
    root = tmp_path_factory.mktemp("effects")

    def make(overrides: Sequence[str]) -> Case:
        key = tuple(dict.fromkeys(overrides))
        if key not in cases:
            folder: Path = root / f"case{len(cases)}"
            folder.mkdir()
            cases[key] = Case(key, folder, make)
        return cases[key]

    make_files(root, make(()))
    return make


@pytest.mark.fast
def test_every_key_has_a_row_and_no_row_is_of_another() -> None:
    rows = {effect.path for effect in TABLE}
    assert [path for path in leaves() if path not in {*rows, *PENDING}] == []
    assert (rows | PENDING.keys()) - leaves().keys() == set()
    assert rows & PENDING.keys() == set()


@pytest.mark.parametrize("effect", TABLE, ids=lambda effect: effect.path)
def test_effect(effect: Effect, case: Callable[[Sequence[str]], Case]) -> None:
    before = case(effect.given)
    after = case([*effect.given, *effect.along, f"{effect.path}={effect.value}"])
    assert before.problems == []
    assert bool(after.problems) == effect.refused, after.problems
    assert effect.observe(before) == effect.before
    assert effect.observe(after) == effect.after
    assert effect.before != effect.after
