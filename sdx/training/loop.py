"""The loop: data, encode, step, and what happens every N steps. Everything it touches is handed in.

Order after a step: metrics of the step before, validation loss, pictures, checkpoint. Metrics of a
step are written before it is saved, so that a run that continues from a checkpoint has every row up
to it; it is measured before it is saved, so that the best checkpoints are known. A state
is fit to be saved whatever its newest step was: a step that was not finite left weights, moments
and average untouched, and the counters say it happened; refusing to save in such a stretch would
only lose the good steps before it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sdx.config.schema import CheckpointConfig
from sdx.data.ahead import Ahead
from sdx.data.loader import HostBatch
from sdx.parallel.agreement import from_first
from sdx.training.metrics import Reporter, TooManyBadSteps
from sdx.training.program import Batch, Metrics, Program
from sdx.training.state import Params, TrainState, sampling_params

Draw = Callable[[int, Params], None]
"""(step, weights) to pictures on disk; does nothing where they already are."""

Validate = Callable[[int, Params], None]
"""(step, weights) to a validation loss on record; does nothing where it already is."""


@runtime_checkable
class Saver(Protocol):
    """What the loop needs of a Checkpointer."""

    def save(self, step: int, state: TrainState) -> None: ...

    def wait(self) -> None: ...


@runtime_checkable
class Tracer(Protocol):
    """What the loop needs of a StepTracer."""

    def step(self, step: int) -> AbstractContextManager[Any]: ...

    def done(self, outputs: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Cadence:
    """When the loop ends and what it does every N steps: null is never, 0 only at the end."""

    max_steps: int
    pictures_every: int | None
    checkpoint: CheckpointConfig
    validation_every: int | None

    def due(self, step: int, every: int | None) -> bool:
        """Whether an act that happens `every` so many steps happens after `step`."""
        if every is None or step == 0:
            return False
        return step >= self.max_steps or (every > 0 and step % every == 0)

    def shows(self, step: int) -> bool:
        """Whether something is measured or drawn after `step`."""
        return self.due(step, self.validation_every) or self.due(step, self.pictures_every)


@dataclass(frozen=True)
class Outcome:
    """The state a run ended with, and whether that was before its last step."""

    state: TrainState
    step: int
    is_interrupted: bool


def train(
    program: Program,
    state: TrainState,
    frozen: Params,
    batches: Iterator[HostBatch],
    cadence: Cadence,
    *,
    checkpointer: Saver,
    reporter: Reporter,
    should_stop: Callable[[int], bool],
    draw: Draw,
    validate: Validate,
    tracer: Tracer,
) -> Outcome:
    """Steps from `state` to `cadence.max_steps`, or until `should_stop(step)` says so; then saves.

    `batches` starts at the state's step. Raises TooManyBadSteps, with the last checkpoint in place.
    """
    step = int(state.step)
    saving = _Saving(cadence, checkpointer, step)
    unread: tuple[int, Metrics] | None = None

    def show() -> None:
        if cadence.due(step, cadence.validation_every):
            validate(step, sampling_params(state))
        if cadence.due(step, cadence.pictures_every):
            draw(step, sampling_params(state))

    with reporter.meter.apart():
        show()  # an attempt may have ended while measuring or drawing
    with closing(_placed(program, batches, step)) as placed:
        try:
            while step < cadence.max_steps and not should_stop(step):
                with tracer.step(step + 1):
                    with reporter.meter.waiting():
                        batch = next(placed)
                    moments, conditioning = program.encode(frozen, batch)
                    state, metrics = program.step(state, moments, conditioning, batch.weights)
                reporter.meter.count()
                step += 1
                if unread:
                    reporter.report(*unread)
                unread = (step, metrics)
                checkpoint = saving.due(step)
                if checkpoint or cadence.shows(step):
                    reporter.report(*unread)
                    unread = None
                with reporter.meter.apart():
                    tracer.done(metrics)
                    show()
                    if checkpoint:
                        saving.save(step, state)
            if unread:
                reporter.report(*unread)
        except TooManyBadSteps:
            checkpointer.wait()
            raise
        finally:
            tracer.close()
        saving.save_last(step, state)
        return Outcome(state, step, is_interrupted=step < cadence.max_steps or should_stop(step))


def _placed(program: Program, batches: Iterator[HostBatch], step: int) -> Ahead[Batch]:
    """Batches on the devices, each put there while the step before it runs."""
    return Ahead(
        lambda number: program.place_batch(next(batches)), step, num_threads=1, name="sdx-placing"
    )


class _Saving:
    """When to save: every N steps, and every so many minutes by the first process's clock."""

    def __init__(self, cadence: Cadence, checkpointer: Saver, step: int):
        self._cadence = cadence
        self._checkpointer = checkpointer
        self._saved_step = step
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        config = self._cadence.checkpoint
        if self._cadence.due(step, config.every):
            return True
        if config.every_minutes is None:
            return False
        limit_s = 60 * config.every_minutes
        return from_first(lambda: time.monotonic() - self._saved_at >= limit_s)

    def save(self, step: int, state: TrainState) -> None:
        self._checkpointer.save(step, state)
        self._saved_step, self._saved_at = step, time.monotonic()

    def save_last(self, step: int, state: TrainState) -> None:
        """Before leaving, unless checkpoints are off or this step is saved."""
        config = self._cadence.checkpoint
        is_on = config.every is not None or config.every_minutes is not None
        if is_on and step > self._saved_step:
            self.save(step, state)
        self._checkpointer.wait()
