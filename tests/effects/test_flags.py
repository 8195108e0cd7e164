"""The flags that a run is compiled with are on its record, whoever has set them."""

from collections.abc import Callable, Sequence

from sdx.parallel.xla_flags import FRACTION
from tests.effects.effect import Case
from tests.effects.runs import PLAIN, finished


def test_flags_are_recorded(case: Callable[[Sequence[str]], Case]) -> None:
    assert finished(case(PLAIN)).record["compiler_flags"] == {FRACTION: "0.5"}
