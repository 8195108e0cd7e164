"""A trace of some steps, for TensorBoard's profile plugin and for xprof: `profiler.*`.

Steps are counted from the start of this attempt, so that a run that goes on from a checkpoint is
traced too. Every attempt has a folder of its own: `RUN/profile/<attempt>/plugins/profile/<time>/`.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax

from sdx.config.schema import ProfilerConfig
from sdx.record.store import AnyPath, remove_tree, upload

STEP = "train"  # what the plugin finds steps by


class StepTracer:
    """Traces `config.steps` steps after the first `config.skip_steps` of this process into
    `folder`, on process 0 alone; `say` gets one line when the trace is there.

    Every step is wrapped in `step` and followed by `done`; `close` comes last, whatever happened.
    """

    def __init__(self, config: ProfilerConfig, folder: AnyPath, say: Callable[[str], None]):
        self._config = config
        self._folder = folder
        self._say = say
        self._written: Path | None = None
        """Where a trace is written while it goes on."""
        self._num_steps = 0
        self._num_traced = 0
        self._is_over = not config.enabled or jax.process_index() != 0

    def step(self, step: int) -> AbstractContextManager[Any]:
        """Around the work of `step`, which the trace shows under that number."""
        if self._is_over:
            return nullcontext()
        self._num_steps += 1
        if self._num_steps <= self._config.skip_steps:
            return nullcontext()
        if self._written is None:
            self._start()
        self._num_traced += 1
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def done(self, outputs: Any) -> None:
        """The step was dispatched and will give `outputs`; with the last one computed the trace
        ends."""
        if self._num_traced == self._config.steps and not self._is_over:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends a trace that the end of training, or a signal, cuts short."""
        if self._is_over:
            return
        self._is_over = True
        if self._written is None:
            wanted = f"profiler.skip_steps={self._config.skip_steps}"
            self._say(f"profile: no trace, this start made {self._num_steps} steps, {wanted}")
            return
        jax.profiler.stop_trace()
        if not isinstance(self._folder, Path):
            upload(self._written, self._folder)
            remove_tree(self._written)
        of_all = "" if self._num_traced == self._config.steps else f" of {self._config.steps}"
        self._say(f"profile: {self._num_traced}{of_all} steps in {self._folder}")

    def _start(self) -> None:
        folder = self._folder
        scratch = folder if isinstance(folder, Path) else Path(tempfile.mkdtemp(prefix="sdx-"))
        jax.profiler.start_trace(scratch)
        self._written = scratch
