"""The estimate of what XLA holds is judged on programs that XLA compiled."""

import re

import pytest

from sdx.planning.estimate import MARGIN, Estimate, estimate
from sdx.planning.temporaries import HABITS
from tests.config.quick import quick
from tests.planning.points import FITTED, JUDGED, Point


def planned(point: Point) -> Estimate:
    return estimate(quick(re.split(r" +", point.overrides)), point.level)


@pytest.mark.parametrize("point", JUDGED, ids=lambda point: f"{point.program} {point.temporaries}")
def test_points_that_fitted_nothing(point: Point) -> None:
    held = planned(point).device_bytes
    estimated = held.step.total if point.program == "step" else held.encode
    assert estimated == pytest.approx(point.temporaries, rel=MARGIN)
    if point.program == "step":
        assert held.state + held.encoded == pytest.approx(point.arguments, rel=1e-3)


@pytest.mark.parametrize("point", FITTED[:2], ids=["one image", "four images"])
def test_points_it_was_fitted_to(point: Point) -> None:
    held = planned(point).device_bytes
    assert held.step.total == pytest.approx(point.temporaries, rel=MARGIN)
    assert held.state == pytest.approx(point.arguments, rel=1e-2)


@pytest.mark.fast
def test_every_level_that_was_measured_has_its_own_numbers() -> None:
    assert {point.level for point in (*FITTED, *JUDGED)} == HABITS.keys()
