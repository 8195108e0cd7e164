"""The validation loss of a run while it trains: which examples it is of, and where it is noted."""

from collections.abc import Callable, Sequence

import numpy as np

from sdx.config import resolve
from sdx.config.check import HELD_OUT
from sdx.config.schema import Config
from sdx.data.source import DataError, Source
from sdx.data.sources.open import open_source
from sdx.record.paths import RunPaths
from sdx.record.run import AnyRecord
from sdx.record.validation import BEST, Step, ValidationHistory, best_checkpoint
from sdx.training.checkpoint import NoValidCheckpoint
from sdx.training.evaluation import Evaluator, check_buckets, evaluation_data, num_measured
from sdx.training.sinks import MetricSink
from sdx.training.state import Params

Say = Callable[[str], None]


def open_validation(config: Config, training: Source, *, say: Say = print) -> Source | None:
    """The examples of `eval.split`, which `training` has not; None with eval.every=null.

    Raises DataError where there is no such split, where it is what is trained on, or where it is
    too small for `eval.num_buckets`.
    """
    split = config.eval.split
    if config.eval.every is None:
        return None
    data = evaluation_data(config.data, split)
    try:
        source = open_source(data, resolution=resolve.resolution(config), say=say)
    except ValueError as error:
        raise DataError(
            f"eval.split={split}: cannot be opened ({error}); give a split that is there, or a part"
            f" of what is trained on: {HELD_OUT}."
        ) from error
    _check_held_out(config, training, source, say)
    size = resolve.global_batch_size(config)
    num_examples = num_measured(source, config.eval.num_batches, size)
    check_buckets(num_examples, config.diffusion.num_train_timesteps, config.eval.num_buckets)
    return source


def _check_held_out(config: Config, training: Source, source: Source, say: Say) -> None:
    """Raises DataError where most of `source` is trained on; says so of a part of it."""
    trained, ours = (getattr(each, "digests", np.zeros(0)) for each in (training, source))
    shared = int(np.isin(ours, trained).sum())
    if training.fingerprint == source.fingerprint or 2 * shared > len(ours):
        raise DataError(
            f"eval.split={config.eval.split}: {shared or len(source)} of its {len(source)} examples"
            f" are trained on too (data.split={config.data.split}); put the others of a folder into"
            f" data.dir/train, or hold a part out: {HELD_OUT}."
        )
    if shared:
        say(f"eval.split={config.eval.split}: {shared} of {len(ours)} images are trained on too")


class Validator:
    """Measures each step once, and tells the sinks, the user and the record."""

    def __init__(
        self,
        evaluator: Evaluator,
        history: ValidationHistory,
        record: AnyRecord,
        sinks: Sequence[MetricSink],
        *,
        say: Say,
        should_stop: Callable[[], bool],
    ):
        self.evaluator = evaluator
        self._history = history
        self._record = record
        self._sinks = sinks
        self._say = say
        self._should_stop = should_stop

    def __call__(self, step: int, params: Params) -> None:
        """The loss of `params` as a row of metrics and in run.json, unless it is there.

        Asked to stop meanwhile, it notes nothing and returns, so that the loop can save; the next
        start measures it.
        """
        if step in self._history.losses:
            return
        measured = self.evaluator(params, self._should_stop)
        if measured is None:
            return
        self._history.losses[step] = measured.loss
        self._record.update(validation=self._history.fields())
        for sink in self._sinks:
            sink.write(step, measured.row())
        self._say(f"step {step}: validation loss {measured.loss:.4f}{self._compared(step)}")

    def _compared(self, step: int) -> str:
        best = self._history.best(self._history.losses)
        if best in ([], [step]):
            return ""
        return f" (best {self._history.losses[best[0]]:.4f} at step {best[0]})"


def continue_history(
    history: ValidationHistory, record: AnyRecord, of: str | None, first_step: int, say: Say
) -> None:
    """Forgets the losses of steps after `first_step`, and all that are of other examples than `of`;
    None where nothing is measured."""
    if history.losses and of not in (None, history.of):
        say("validation: other examples than before; earlier losses are not compared with")
        history.losses.clear()
    history.of = history.of if of is None else of
    history.cut_after(first_step)
    if history.of:
        record.update(validation=history.fields())


def named_step(paths: RunPaths, step: Step | None) -> int | None:
    """The step that is meant, None for the newest; NoValidCheckpoint where none was measured."""
    if step != BEST:
        return step
    best = best_checkpoint(paths)
    if best is None:
        raise NoValidCheckpoint(
            f"{paths.root}: no checkpoint of it was measured (eval.every), so none is the best; "
            "give a step."
        )
    return best
