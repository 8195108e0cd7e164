"""Every key of the schema does what its help says: one row a key, none may be missing."""

from collections.abc import Callable, Sequence

import pytest

from sdx.config.leaves import leaves
from tests.effects import (
    architecture,
    cached,
    data,
    described,
    flags,
    kernels,
    noising,
    pictures,
    place,
    processes,
    runs,
    updates,
    weights,
)
from tests.effects.effect import Case, Effect

TABLE: list[Effect] = [
    *architecture.EFFECTS,
    *cached.EFFECTS,
    *data.EFFECTS,
    *described.EFFECTS,
    *flags.EFFECTS,
    *kernels.EFFECTS,
    *noising.EFFECTS,
    *pictures.EFFECTS,
    *place.EFFECTS,
    *processes.EFFECTS,
    *runs.EFFECTS,
    *weights.EFFECTS,
    *updates.EFFECTS,
]


PENDING: dict[str, str] = {}
"""Keys without a row, and why."""


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
