"""Rows, event files, rates and the progress line."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import Sink
from sdx.record.metrics import read_metrics
from sdx.record.paths import RunPaths
from sdx.training.metrics import (
    ProgressLine,
    Reporter,
    StepMeter,
    TooManyBadSteps,
    Workload,
    format_seconds,
)
from sdx.training.sinks import JsonlSink, Told, make_sinks

pytestmark = pytest.mark.fast


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_meter(clock: Clock, peak_tflops: float | None = 10.0) -> StepMeter:
    return StepMeter(Workload(8, 4e12, 2, peak_tflops), clock)


def step_metrics(loss: float, bad_in_a_row: int = 0) -> dict[str, jnp.ndarray]:
    values = {
        "loss": loss,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "bad": float(bad_in_a_row > 0),
        "num_bad_steps": float(bad_in_a_row),
        "bad_in_a_row": float(bad_in_a_row),
    }
    return {name: jnp.float32(value) for name, value in values.items()}


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[JsonlSink]:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    yield sink
    sink.close()


def make_reporter(sink: JsonlSink, every: int = 1) -> Reporter:
    return Reporter(
        every=every,
        max_steps=10,
        max_bad_steps=3,
        meter=make_meter(Clock()),
        sinks=[sink],
        progress=ProgressLine(10, out=io.StringIO()),
    )


def test_rows_have_the_keys_scripts_rely_on(sink: JsonlSink, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = make_reporter(sink, every=3)
    for step in range(1, 11):
        reporter.report(step, step_metrics(loss=step / 10))
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    assert rows[0]["loss"] == np.float32(0.3)  # the step's own, not a mean
    assert set(rows[0]) == {
        "step", "loss", "grad_norm", "lr", "num_bad_steps", "step_s", "images_per_s",
        "tflops_per_device", "mfu", "data_wait", "memory_gib",
    }  # fmt: skip


def test_a_row_is_on_disk_when_written(sink: JsonlSink, tmp_path: Path) -> None:
    sink.write(1, {"loss": float("nan"), "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "lr": 0.5,
    }


def test_too_many_bad_steps_in_a_row_stop_the_run(sink: JsonlSink, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = make_reporter(sink, every=100)
    for step, bad in ((5, 1), (6, 2)):
        reporter.report(step, step_metrics(float("nan"), bad))
    with pytest.raises(TooManyBadSteps, match=r"max_bad_steps=3: .* the steps 5 to 7;"):
        reporter.report(7, step_metrics(float("nan"), 3))
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (5, None),
        (6, None),
        (7, None),
    ]


def test_a_reader_that_goes_away_ends_nothing() -> None:
    """`python -m sdx.train | head -1`"""
    script = """
import sys
from sdx.training.metrics import ProgressLine
progress = ProgressLine(3)
for _ in range(3):
    progress.say("x" * 100_000)
print("and others")
sys.stderr.write("the end")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "the end" and process.wait() == 0
    process.stderr.close()


def test_rates_leave_out_what_is_not_stepping() -> None:
    clock = Clock()
    meter = make_meter(clock)
    with meter.waiting():
        clock.now += 1
    clock.now += 3
    with meter.apart():
        clock.now += 100
    meter.count()
    meter.count()
    rates = meter.rates()
    assert rates["step_s"] == pytest.approx(2)
    assert rates["images_per_s"] == pytest.approx(4)
    assert rates["tflops_per_device"] == pytest.approx(1)
    assert rates["mfu"] == pytest.approx(0.1)
    assert rates["data_wait"] == pytest.approx(0.25)
    assert rates["memory_gib"] > 0.01
    clock.now += 1
    meter.count()
    assert meter.rates()["step_s"] == pytest.approx(1)
    clock.now += 0.01  # a row asked for with no step dispatched since the one before
    assert meter.rates()["step_s"] == pytest.approx(1)
    assert "mfu" not in make_meter(clock, peak_tflops=None).rates()


def test_tensorboard_shows_what_was_written_and_hides_an_older_attempt(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    (old,) = make_sinks([Sink.tensorboard, Sink.tensorboard], Told(paths, first_step=1))
    for step in range(1, 8):
        old.write(step, {"loss": 1.0})
    old.close()
    (sink,) = make_sinks([Sink.tensorboard], Told(paths, first_step=5))
    for step in range(5, 9):
        sink.write(step, {"loss": 2.0})
    sink.picture(8, "samples", np.zeros((4, 6, 3), np.uint8))
    events = read_events(paths.tensorboard)
    sink.close()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *((step, 1.0) for step in range(1, 5)),
        *((step, 2.0) for step in range(5, 9)),
    ]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (8, 6, 4)


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    return events.Reload()


VALUES = {"loss": 0.123456, "step_s": 30.0, "images_per_s": 4.0, "num_bad_steps": 0.0}


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine(10, out=out, clock=clock)
    for step in range(1, 11):
        line.show(step, VALUES)
        clock.now += 4
    assert out.getvalue().splitlines() == [
        "step 1/10  loss 0.1235  4.0 images/s  4 min left",
        "step 4/10  loss 0.1235  4.0 images/s  3 min left",
        "step 7/10  loss 0.1235  4.0 images/s  2 min left",
        "step 10/10  loss 0.1235  4.0 images/s  0 s left",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_and_messages_above_it() -> None:
    out = Terminal()
    line = ProgressLine(10, out=out, clock=Clock())
    line.show(1, VALUES)
    line.show(2, VALUES | {"num_bad_steps": 2.0})
    line.say("saved")
    line.show(3, VALUES)
    line.close()
    shown = out.getvalue()
    assert shown.count("\n") == 2 and shown.endswith("left\n") and "(2 bad steps)" in shown
    assert "\rsaved\n" in shown.replace(" " * 10, "").replace(" \r", "\r")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.0, "3 s"), (59.6, "1 min"), (600.0, "10 min"), (3900.0, "1 h 05 min")]
)
def test_time_left_is_short(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
