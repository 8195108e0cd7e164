"""The loader benchmark compares the same pixels, and fails where a bound is missed."""

import numpy as np
import pytest

from tests.benchmarks import loader

pytestmark = pytest.mark.fast


def test_both_ways_give_the_same_pixels_and_are_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "SOURCES", {"96 x 64": (96, 64), "64 x 96": (64, 96)})
    assert len(loader.measure_images(rounds=2, side=32, images=2)) == 2
    assert capsys.readouterr().out.count("ratio") == 2


def test_another_picture_is_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "by_sdx", lambda path, side: np.zeros((side, side, 3), np.uint8))
    with pytest.raises(AssertionError, match="not equal"):
        loader.measure_images(rounds=1, side=32, images=1)


def test_records_are_read_back_and_a_missed_bound_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "SIDE", 64)
    slow = loader.Rate(per_cpu_s=49_999, per_wall_s=1e9)
    monkeypatch.setattr(loader, "rate", lambda work: (work(), slow)[1])
    assert loader.measure_cache(rounds=1, num_examples=70, batch=8, workers=(0,)) == [False]
    assert "49,999/s of CPU" in capsys.readouterr().out
