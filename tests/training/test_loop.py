"""When the loop writes, draws, saves and stops; around a toy program that counts."""

import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import CheckpointConfig
from sdx.data.loader import HostBatch
from sdx.training.loop import Cadence, Outcome, train
from sdx.training.metrics import (
    ProgressLine,
    Reporter,
    StepMeter,
    TooManyBadSteps,
    Workload,
)
from sdx.training.program import Batch, Program
from sdx.training.sinks import MetricSink
from sdx.training.state import TrainState

pytestmark = pytest.mark.fast


class Journal:
    """Everything the loop did, in order; stands in for sink, checkpointer and draw."""

    def __init__(self, stop_at: int | None = None):
        self.acts: list[tuple[str, int]] = []
        self.stop_at = stop_at
        self.rows: list[int] = []

    def write(self, step: int, values: Any) -> None:
        self.acts.append(("row", step))

    def picture(self, step: int, tag: str, image: Any) -> None: ...

    def close(self, exit_code: int = 0) -> None:
        self.acts.append(("close", 0))

    def save(self, step: int, state: TrainState) -> None:
        assert int(state.step) == step and state.params["unet"] == step
        self.acts.append(("save", step))

    def wait(self) -> None:
        self.acts.append(("wait", 0))

    def draw(self, step: int, params: Any) -> None:
        assert params["unet"] == 10 * step  # the average
        self.acts.append(("draw", step))

    def validate(self, step: int, params: Any) -> None:
        assert params["unet"] == 10 * step
        self.acts.append(("validate", step))

    def should_stop(self, step: int) -> bool:
        return self.stop_at is not None and step >= self.stop_at

    def step(self, step: int) -> AbstractContextManager[None]:
        self.traced = step
        return nullcontext()

    def done(self, outputs: Any) -> None:
        assert float(outputs["num_steps"]) == self.traced

    def steps(self, act: str) -> list[int]:
        return [step for name, step in self.acts if name == act]


def make_state(step: int = 0) -> TrainState:
    zero = jnp.int32(0)
    return TrainState(
        step=jnp.int32(step),
        num_updates=zero,
        num_bad_steps=zero,
        bad_in_a_row=zero,
        params={"unet": jnp.float32(step)},
        ema={"unet": jnp.float32(10 * step)},
        opt_state=(),
    )


def count(state: TrainState, moments: jax.Array, context: Any, weights: jax.Array) -> Any:
    """A step that adds one, and is bad where the picture's mean is not finite."""
    bad = jnp.where(jnp.isfinite(moments.mean()), 0, 1)
    state = replace(
        state,
        step=state.step + 1,
        bad_in_a_row=(state.bad_in_a_row + bad) * bad,
        params={"unet": state.params["unet"] + 1},
        ema={"unet": state.params["unet"] * 10 + 10},
    )
    metrics = {"loss": moments.mean(), "num_steps": state.step}
    metrics |= {"bad": bad, "bad_in_a_row": state.bad_in_a_row}
    return state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


class ToyProgram(Program):
    """Pictures are their own moments; white ones are not finite."""

    def __init__(self) -> None:
        object.__setattr__(self, "step", jax.jit(count))
        object.__setattr__(self, "encode", self.pass_on)

    def place_batch(self, host: HostBatch) -> Batch:
        images: Any = host.images
        return Batch(images, jnp.asarray(host.tokens), jnp.asarray(host.weights))

    def pass_on(self, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        images: Any = batch.images
        return jnp.where(images == 255, jnp.nan, images.astype(jnp.float32)), batch.tokens


def batches(start: int, bad: tuple[int, ...] = ()) -> Iterator[HostBatch]:
    """Batch k is that of step k, 0 the first; white ones are bad."""
    step = start
    while True:
        yield HostBatch(
            step=step,
            images=np.full((1, 2, 2, 3), 255 if step in bad else 1, np.uint8),
            tokens=np.zeros((1, 3), np.int32),
            weights=np.ones(1, np.float32),
            indices=np.zeros(1, np.int64),
            epochs=np.zeros(1, np.int64),
            bad_images=(),
        )
        step += 1


def run(
    journal: Journal,
    *,
    start: int = 0,
    max_steps: int = 7,
    pictures_every: int | None = 4,
    validation_every: int | None = None,
    checkpoint: CheckpointConfig | None = None,
    bad: tuple[int, ...] = (),
    program: ToyProgram | None = None,
) -> Outcome:
    sinks: list[MetricSink] = [journal]
    reporter = Reporter(
        every=1,
        max_steps=max_steps,
        max_bad_steps=2,
        meter=StepMeter(Workload(1, 1.0, 1, None)),
        sinks=sinks,
        progress=ProgressLine(max_steps, out=io.StringIO()),
    )
    return train(
        program or ToyProgram(),
        make_state(start),
        {},
        batches(start, bad),
        Cadence(
            max_steps, pictures_every, checkpoint or CheckpointConfig(every=3), validation_every
        ),
        checkpointer=journal,
        reporter=reporter,
        should_stop=journal.should_stop,
        draw=journal.draw,
        validate=journal.validate,
        tracer=journal,
    )


def test_everything_happens_in_its_time_and_order() -> None:
    journal = Journal()
    outcome = run(journal)
    assert (outcome.step, outcome.is_interrupted) == (7, False)
    assert journal.steps("row") == [1, 2, 3, 4, 5, 6, 7]
    assert journal.steps("draw") == [4, 7]
    assert journal.steps("save") == [3, 6, 7]
    assert journal.acts[-5:-2] == [("row", 7), ("draw", 7), ("save", 7)]
    assert journal.acts[-2:] == [("close", 0), ("wait", 0)]


def test_a_row_is_written_before_its_step_is_saved() -> None:
    journal = Journal()
    run(journal)
    for step in journal.steps("save"):
        assert journal.acts.index(("row", step)) < journal.acts.index(("save", step))


def test_a_step_is_measured_before_it_is_saved_and_after_its_row() -> None:
    journal = Journal()
    run(journal, validation_every=3)
    assert journal.steps("validate") == [3, 6, 7]
    for step in journal.steps("validate"):
        acts = [journal.acts.index((act, step)) for act in ("row", "validate", "save")]
        assert acts == sorted(acts)


def test_what_a_stop_kept_from_being_measured_is_measured_on_going_on() -> None:
    for start, measured in ((4, [4, 7]), (5, [7]), (7, [7])):
        journal = Journal()
        run(journal, start=start, validation_every=2)
        assert journal.steps("validate") == sorted({*measured, *([6] if start < 6 else [])})


def test_null_is_never_and_zero_is_at_the_end() -> None:
    journal = Journal()
    run(journal, pictures_every=None, checkpoint=CheckpointConfig(every=None))
    assert {name for name, _ in journal.acts} == {"row", "close", "wait"}
    journal = Journal()
    run(journal, pictures_every=0, checkpoint=CheckpointConfig(every=0), validation_every=0)
    assert journal.steps("draw") == journal.steps("save") == journal.steps("validate") == [7]


def test_minutes_save_too() -> None:
    journal = Journal()
    run(journal, checkpoint=CheckpointConfig(every=None, every_minutes=1e-9))
    assert journal.steps("save") == [1, 2, 3, 4, 5, 6, 7]


def test_a_stop_saves_the_step_it_came_at() -> None:
    journal = Journal(stop_at=5)
    outcome = run(journal)
    assert (outcome.step, outcome.is_interrupted) == (5, True)
    assert journal.steps("save") == [3, 5] and journal.steps("row")[-1] == 5
    assert int(outcome.state.step) == 5


def test_a_stop_at_a_saved_step_does_not_save_it_again() -> None:
    journal = Journal(stop_at=3)
    run(journal)
    assert journal.steps("save") == [3]


def test_going_on_does_the_rest_and_no_more() -> None:
    journal = Journal()
    outcome = run(journal, start=5)
    assert outcome.step == 7 and journal.steps("row") == [6, 7]
    assert journal.steps("draw") == [7] and journal.steps("save") == [6, 7]


def test_pictures_a_stop_prevented_are_drawn_on_going_on() -> None:
    journal = Journal()
    run(journal, start=7)
    assert journal.steps("draw") == [7] and not journal.steps("row") and not journal.steps("save")


def test_a_bad_step_goes_on_and_too_many_do_not_save() -> None:
    journal = Journal()
    assert run(journal, bad=(1, 3)).step == 7
    journal = Journal()
    with pytest.raises(TooManyBadSteps):
        run(journal, bad=(3, 4, 5, 6))
    assert journal.steps("row") == [1, 2, 3, 4, 5]
    assert journal.steps("save") == [3] and ("wait", 0) in journal.acts


class Watched(ToyProgram):
    """Notes which batches were put on the devices when a step is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.placed: list[int] = []
        self.seen_by_step: list[int] = []
        is_placed = self.is_placed = threading.Condition()

        def counted(state: TrainState, *batch: Any) -> Any:
            with is_placed:  # the batch behind this one comes while this step runs
                assert is_placed.wait_for(lambda: len(self.placed) > len(self.seen_by_step) + 1, 5)
            self.seen_by_step.append(self.placed[len(self.seen_by_step)])
            return count(state, *batch)

        object.__setattr__(self, "step", counted)

    def place_batch(self, host: HostBatch) -> Batch:
        with self.is_placed:
            self.placed.append(host.step)
            self.is_placed.notify_all()
        return super().place_batch(host)


def test_the_next_batch_is_placed_while_a_step_runs() -> None:
    program = Watched()
    outcome = run(Journal(), program=program, start=2)
    assert outcome.step == 7 and program.seen_by_step == [2, 3, 4, 5, 6]
    assert program.placed == [2, 3, 4, 5, 6, 7], "one ahead, no more"
    assert not [thread for thread in threading.enumerate() if "placing" in thread.name]


def test_a_batch_that_cannot_be_placed_fails_the_step_that_needs_it() -> None:
    journal = Journal()
    program = ToyProgram()
    place = program.place_batch

    def fail_at_four(host: HostBatch) -> Batch:
        if host.step == 4:
            raise RuntimeError("no memory left on device 0")
        return place(host)

    object.__setattr__(program, "place_batch", fail_at_four)
    with pytest.raises(RuntimeError, match="no memory left"):
        run(journal, program=program)
    assert journal.steps("save") == [3] and journal.steps("draw") == [4]
    assert not [thread for thread in threading.enumerate() if "placing" in thread.name]
