"""A trace of some steps, for TensorBoard's profile plugin and for xprof: `profiler.*`.

Steps are counted from the start of this attempt, so that a run that goes on from a checkpoint is
traced too. Every attempt has a folder of its own: `RUN/profile/<attempt>/plugins/profile/<time>/`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

from sdx.config.schema import ProfilerConfig

STEP = "train"  # what the plugin calls a step


class StepTracer:
    """Traces `config.steps` steps after the first `config.skip_steps` of this process into
    `folder`; on process 0 alone. `say` gets one line when the trace is there."""

    def __init__(self, config: ProfilerConfig, folder: Path, say: Callable[[str], None]):
        self._config = config
        self._folder = folder
        self._say = say
        self._num_steps = 0
        self._num_traced = 0
        self._is_tracing = False
        self._is_over = not config.enabled or jax.process_index() != 0

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Around the work of `step`: the trace shows it under that number."""
        if self._is_over:
            return nullcontext()
        if not self._is_tracing and self._num_steps == self._config.skip_steps:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True
        self._num_steps += 1
        if not self._is_tracing:
            return nullcontext()
        self._num_traced += 1
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def done(self, outputs: Any) -> None:
        """The step was dispatched and will give `outputs`; the trace ends with the last of its
        steps, once that is computed."""
        if self._is_tracing and self._num_traced == self._config.steps:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends a trace that the end of training, or a signal, cuts short."""
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
            short = "" if self._num_traced == self._config.steps else f" of {self._config.steps}"
            self._say(f"profile: {self._num_traced}{short} steps in {self._folder}")
        elif not self._is_over:
            needed = self._config.skip_steps + 1
            self._say(f"profile: nothing traced, {self._num_steps} steps were made, not {needed}")
        self._is_over = True
