"""What is measured while training, and who reads it: meters, rows, and the line on the terminal.

Metrics of a step are read after the next one is dispatched, so reading them never makes a device
wait. A row holds the values of its own step (a mean over steps would depend on where a run was
resumed); rates are means since the row before.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax

from sdx.training.sinks import MetricSink

LINE_EVERY_S = 10.0  # a plain line on something that is not a terminal, at most this often
GIB = 2**30


class TooManyBadSteps(RuntimeError):
    """Loss or gradient was not finite in too many steps in a row."""


@dataclass(frozen=True)
class Workload:
    """What one step does, to turn seconds into rates."""

    batch_size: int
    flops: float
    num_devices: int
    peak_tflops: float | None
    """Of one device; None where unknown, then no MFU is reported."""


class StepMeter:
    """Rates since they were last asked for; time spent `apart` from stepping does not count."""

    def __init__(self, workload: Workload, clock: Callable[[], float] = time.perf_counter):
        self._workload = workload
        self._clock = clock
        self._last: dict[str, float] | None = None
        self._restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        start = self._clock()
        yield
        self._waited_s += self._clock() - start

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is not stepping: pictures, checkpoints."""
        start = self._clock()
        yield
        self._start += self._clock() - start

    def count(self) -> None:
        """One more step was dispatched."""
        self._num_steps += 1

    def rates(self) -> dict[str, float]:
        """Seconds a step, images and TFLOP a second, the share of time that waits for data,
        memory.

        Steps count when they are dispatched: on CPU that is when they run, and a row is asked for
        after the step behind it was dispatched. Asked again before another one was, it repeats
        itself.
        """
        if self._last is not None and self._num_steps == 0:
            return self._last
        elapsed = max(self._clock() - self._start, 1e-9)
        step_s = elapsed / max(self._num_steps, 1)
        work = self._workload
        tflops = work.flops / step_s / work.num_devices / 1e12
        rates = {
            "step_s": step_s,
            "images_per_s": work.batch_size / step_s,
            "tflops_per_device": tflops,
            "data_wait": min(self._waited_s / elapsed, 1.0),
            "memory_gib": memory_bytes() / GIB,
        }
        if work.peak_tflops is not None:
            rates["mfu"] = tflops / work.peak_tflops
        self._restart()
        self._last = rates
        return rates

    def _restart(self) -> None:
        self._start = self._clock()
        self._waited_s = 0.0
        self._num_steps = 0


def memory_bytes() -> int:
    """Peak memory of the fullest local device; of this process where devices do not say (CPU)."""
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@runtime_checkable
class Output(Protocol):
    """Where lines go: standard output, or what stands in for it."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...


class ProgressLine:
    """How far a run is: one line rewritten in place on a terminal, a plain line now and then
    elsewhere."""

    def __init__(
        self,
        max_steps: int,
        *,
        out: Output | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._max_steps = max_steps
        self._out = out or sys.stdout
        self._clock = clock
        self._is_terminal = self._out.isatty()
        self._width = 0
        self._shown_at = -math.inf

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Step, loss, rate and time left."""
        left = format_seconds((self._max_steps - step) * values["step_s"])
        text = (
            f"step {step}/{self._max_steps}  loss {values['loss']:.4f}  "
            f"{values['images_per_s']:.1f} images/s  {left} left"
        )
        if values.get("num_bad_steps"):
            text += f"  ({values['num_bad_steps']:.0f} bad steps)"
        self.write(text, is_last=step >= self._max_steps)

    def write(self, text: str, *, is_last: bool) -> None:
        """The line itself; off a terminal only now and then, and the last one."""
        if not self._is_terminal and not is_last and self._clock() < self._shown_at + LINE_EVERY_S:
            return
        self._shown_at = self._clock()
        if self._is_terminal:
            self._print(f"\r{text:<{self._width}}", end="")
            self._width = len(text)
        else:
            self._print(text)

    def say(self, text: str) -> None:
        """A line of its own, that the progress line does not overwrite."""
        if self._is_terminal and self._width:
            self._print(f"\r{' ' * self._width}\r", end="")
            self._width = 0
        self._print(text)

    def close(self) -> None:
        """Leaves the last progress line standing."""
        if self._is_terminal and self._width:
            self._print("")
            self._width = 0

    def _print(self, text: str, end: str = "\n") -> None:
        try:
            print(text, end=end, file=self._out, flush=True)
        except BrokenPipeError:
            if self._out is not sys.stdout:
                raise
            # `| head` has seen enough: no reason to end a run, whose log goes on. What else prints,
            # and Python when it ends, must not fail either.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def format_seconds(seconds: float) -> str:
    """`3 h 05 min`, `12 min`, `40 s`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Reporter:
    """Reads each step's metrics and hands every Nth to the sinks and the progress line."""

    def __init__(
        self,
        *,
        every: int,
        max_steps: int,
        max_bad_steps: int,
        meter: StepMeter,
        sinks: Sequence[MetricSink],
        progress: ProgressLine,
        on_row: Callable[[int], None] = lambda step: None,
    ):
        self.meter = meter
        self.progress = progress
        self._every = every
        self._max_steps = max_steps
        self._max_bad_steps = max_bad_steps
        self._sinks = sinks
        self._on_row = on_row

    def report(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Waits for `step` and reports it; raises TooManyBadSteps at the end of a row of bad
        ones."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        bad_in_a_row = int(values.pop("bad_in_a_row"))
        is_bad = bool(values.pop("bad"))
        if step % self._every == 0 or step == self._max_steps or is_bad:
            self._write(step, values)
        if bad_in_a_row >= self._max_bad_steps:
            raise TooManyBadSteps(
                f"train.max_bad_steps={self._max_bad_steps}: loss or gradient was not finite in "
                f"the steps {step - bad_in_a_row + 1} to {step}; their updates were skipped, so "
                "that checkpoints hold good weights. Try a smaller optimizer.lr, "
                "optimizer.max_grad_norm, or model.activations_dtype=float32."
            )

    def _write(self, step: int, values: dict[str, float]) -> None:
        row = values | self.meter.rates()
        for sink in self._sinks:
            sink.write(step, row)
        self.progress.show(step, row)
        self._on_row(step)
