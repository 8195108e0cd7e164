"""The estimate of what XLA holds is judged on programs that XLA compiled."""

import re
from functools import cache

import pytest

from sdx.planning.estimate import MARGIN, DeviceBytes, estimate
from sdx.planning.temporaries import HABITS
from tests.config.quick import quick
from tests.planning.points import FITTED, JUDGED, Point

ALWAYS = (*JUDGED[:4], JUDGED[8], *JUDGED[-2:])
"""The whole model, and one of each kind of change; the others before a release."""


@cache
def held_by(overrides: str, level: str) -> DeviceBytes:
    return estimate(quick(re.split(r" +", overrides)), level).device_bytes


def planned(point: Point) -> DeviceBytes:
    return held_by(point.overrides, point.level)


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in ALWAYS else pytest.mark.release) for point in JUDGED],
    ids=lambda point: f"{point.program} {point.temporaries}",
)
def test_points_that_fitted_nothing(point: Point) -> None:
    held = planned(point)
    estimated = held.step.total if point.program == "step" else held.encode
    assert estimated == pytest.approx(point.temporaries, rel=MARGIN)
    if point.program == "step":
        assert held.state + held.encoded == pytest.approx(point.arguments, rel=1e-3)


@pytest.mark.parametrize("point", FITTED[:2], ids=["one image", "four images"])
def test_points_it_was_fitted_to(point: Point) -> None:
    held = planned(point)
    assert held.step.total == pytest.approx(point.temporaries, rel=MARGIN)
    assert held.state == pytest.approx(point.arguments, rel=1e-2)


@pytest.mark.fast
def test_every_level_that_was_measured_has_its_own_numbers() -> None:
    assert {point.level for point in (*FITTED, *JUDGED)} == HABITS.keys()
