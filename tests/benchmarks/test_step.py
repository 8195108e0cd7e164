"""The step benchmark compares the same work, and notices when it does not."""

from dataclasses import replace

import pytest

from tests.benchmarks import step


def test_micro_benchmark_agrees(capfd: pytest.CaptureFixture[str]) -> None:
    assert step.compare(step.MICRO, steps=2, threads=1) == 0
    assert "ratio" in capfd.readouterr().out


@pytest.mark.fast
def test_a_disagreement_is_an_error() -> None:
    same = step.Step(loss=1.0, grad_norm=2.0, wall_s=1.0, cpu_s=1.0)
    assert step.report([(same, same)] * 2) == 0
    for wrong in (replace(same, loss=1.001), replace(same, grad_norm=float("nan"))):
        assert step.report([(same, same), (wrong, same)]) == 1
