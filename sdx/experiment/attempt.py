"""The acts of a start that holds its folder: compile, restore, train, draw, judge, export."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict

from sdx.config import resolve
from sdx.config.leaves import plain
from sdx.config.schema import Config, Init, Platform, ResumePolicy
from sdx.data.buckets import describe
from sdx.data.loader import make_loader
from sdx.data.source import BadImage
from sdx.experiment.compilation_cache import heal_compilation_cache
from sdx.experiment.exporting import export_at_end
from sdx.experiment.gallery import Gallery
from sdx.experiment.setup import Setup, bold_rate, departure, lost_precision
from sdx.experiment.taking import Taken
from sdx.experiment.validating import Validator, continue_history
from sdx.models.attention_choice import describe as describe_attention
from sdx.parallel.agreement import from_first, gather, is_first, process_count
from sdx.parallel.failures import within
from sdx.parallel.memory import keep_freed_memory
from sdx.parallel.stopping import EXIT_INTERRUPTED, StopFlag
from sdx.parallel.whole import tree_to_first_host
from sdx.pipeline import Params, Pipeline, make_pipeline
from sdx.record.files import read_json, write_text
from sdx.record.log import Log
from sdx.record.metrics import truncate_after
from sdx.record.redact import redact
from sdx.record.status import Status
from sdx.record.stop_request import StopWatch
from sdx.record.store import StoreError
from sdx.record.validation import ValidationHistory, history_of
from sdx.sampling.denoise import SamplingStopped
from sdx.training.checkpoint import Checkpointer, NoValidCheckpoint, restore_step
from sdx.training.evaluation import Evaluator, evaluation_data, make_evaluator, num_measured
from sdx.training.loop import Cadence, Outcome, Validate, train
from sdx.training.metrics import ProgressLine, Reporter, StepMeter, Workload
from sdx.training.profile import StepTracer
from sdx.training.program import Program, attention_of, build
from sdx.training.sinks import MetricSink, Told, make_sinks
from sdx.training.state import TrainState, sampling_params
from sdx.weights.load import LOADERS

FINISHED, FAILED = 0, 1
_SINKS_S = 5.0  # of the ten that `failures` gives the record of a run of many processes


class FolderLost(RuntimeError):
    """The run folder belongs to another process by now."""


class ExportFailed(RuntimeError):
    """The model could not be exported; its training is done."""


class Attempt:
    """One start of a run that holds its folder.

    Of many processes all do the same, in the same order; the first one decides what the clock and
    the folder decide, writes, and speaks.
    """

    def __init__(self, setup: Setup, taken: Taken, stop: StopFlag):
        self.setup = setup
        self.record = taken.record
        self.fork = taken.fork
        self.stop = stop
        self.log = Log(setup.paths.log)
        self.progress = ProgressLine(setup.max_steps)
        self.sinks: Sequence[MetricSink] = ()

    def run(self) -> int:
        """Everything from compiling to the last picture; returns the exit code."""
        self.say(_headline(self.setup))
        if self.setup.config.hardware.simulate:
            self.record.update(simulated=True)  # from now on, whatever goes on with the run
        for warn in (lost_precision, bold_rate, departure):
            warning = warn(self.setup.config)
            if warning is not None:
                self.say(warning)
        with self._stops_when_asked():
            try:
                with self.stop.compiling():
                    program = self._compile()
                    frozen = self._load_frozen(program)
                    evaluator = self._evaluator(program, frozen)
                return self._train(program, frozen, evaluator)
            except SamplingStopped:
                return self._interrupted(self.record.step)

    def fail(self, reason: str, trace: str = "") -> None:
        """Notes that the run failed and why; what it saved stays."""
        try:
            if trace:
                self.log.write(trace)
                print(trace, file=sys.stderr)
            self.say(f"failed: {reason}")
            if process_count() == 1:
                self._close_sinks(FAILED)
            else:  # all of them leave soon, and W&B can take longer
                within(_SINKS_S, lambda: self._close_sinks(FAILED))
            self.record.finish(Status.failed, reason=reason)
        except StoreError as error:  # perhaps the very reason
            print(f"sdx: not on record ({error})", file=sys.stderr)

    def say(self, text: str) -> None:
        """One line for the user and the log."""
        if is_first():
            self.progress.say(text)
            self.log.write(text)

    def _compile(self) -> Program:
        setup, config = self.setup, self.setup.config
        shares = None
        if setup.buckets is not None:
            self.say(f"compiling {describe(setup.buckets)}")
            shares = setup.buckets.shares(resolve.global_batch_size(config))
        program = build(config, setup.mesh, max_steps=setup.max_steps, buckets=shares)
        self._note_attention()
        with heal_compilation_cache(config.run.compilation_cache_dir):
            program = program.compile()
        if resolve.platform(config) is Platform.cpu:
            keep_freed_memory()
        assert program.compile_s is not None
        self.say(f"compiled in {max(gather(program.compile_s)):.1f} s")  # all wait for the slowest
        return program

    def _note_attention(self) -> None:
        """Which kernel computes what, by queries x keys: said, and kept in run.json."""
        config = self.setup.config
        side = resolve.resolution(config) // resolve.vae_factor(config)
        chosen = describe_attention(
            attention_of(config, self.setup.mesh),
            config.model,
            side,
            mask_padding_tokens=config.attention.mask_padding_tokens,
        )
        self.record.update(attention=chosen)
        sizes = {
            name: [size for size in chosen if chosen[size] == name] for name in chosen.values()
        }
        parts = [f"{name} ({', '.join(sizes[name])})" for name in sizes]
        self.say(f"attention: {'; '.join(parts) if len(parts) > 1 else next(iter(sizes))}")

    def _load_frozen(self, program: Program) -> Params:
        return program.place_frozen(**self._load(program.abstract_frozen))

    def _load(self, abstract: Params) -> Params:
        """The pretrained weights of these networks."""
        setup = self.setup
        files = {"unet": setup.unet or setup.weights}
        return {
            name: LOADERS[name](files.get(name, setup.weights), like)
            for name, like in abstract.items()
        }

    def _evaluator(self, program: Program, frozen: Params) -> Evaluator | None:
        """What measures the validation loss, compiled; None with eval.every=null."""
        setup, config = self.setup, self.setup.config
        if setup.validation is None:
            return None
        size, num_batches = program.global_batch_size, config.eval.num_batches
        with heal_compilation_cache(config.run.compilation_cache_dir):
            return make_evaluator(
                program,
                frozen,
                setup.validation,
                setup.tokenizer,
                evaluation_data(config.data, config.eval.split),
                resolution=resolve.resolution(config),
                num_examples=num_measured(setup.validation, num_batches, size),
                num_buckets=config.eval.num_buckets,
            )

    def _train(self, program: Program, frozen: Params, evaluator: Evaluator | None) -> int:
        setup, config, paths = self.setup, self.setup.config, self.setup.paths
        history = history_of(from_first(lambda: (read_json(paths.run) or {}).get("validation")))
        checkpointer = self._checkpointer(history)
        with closing(checkpointer):
            state = self._first_state(program, checkpointer)
            first_step = int(state.step)
            self._note_bad_images()
            self._cut_back(first_step)
            of = None if evaluator is None else evaluator.of
            continue_history(history, self.record, of, first_step, self.say)
            sinks = self.sinks = self._make_sinks(first_step + 1)
            pipeline = self._pipeline(program, frozen)
            gallery = Gallery(config, paths, pipeline, sinks, self.stop.agreed)
            loader = make_loader(
                setup.source,
                setup.tokenizer,
                config.data,
                seed=config.run.seed,
                global_batch_size=program.global_batch_size,
                resolution=resolve.resolution(config),
                start_step=first_step,
                rows=program.host_rows,
                buckets=setup.buckets,
            )
            with loader:
                outcome = train(
                    program,
                    state,
                    frozen,
                    loader,
                    Cadence(
                        setup.max_steps, config.sample.every, config.checkpoint, config.eval.every
                    ),
                    checkpointer=checkpointer,
                    reporter=self._reporter(program, sinks),
                    should_stop=lambda step: self._should_stop(),
                    draw=gallery.draw_grid,
                    validate=self._validator(evaluator, history, sinks),
                    tracer=StepTracer(
                        config.profiler, paths.profile(self.record.attempt), self.say
                    ),
                )
            late = {} if evaluator is None else evaluator.bad_images
            self._note_bad_images([*loader.bad_images.values(), *late.values()])
            self.progress.close()
            if outcome.is_interrupted:
                return self._interrupted(outcome.step)
            self._conclude(outcome, gallery)
            self._close_sinks(FINISHED)
        if config.export.at_end:
            self._export(pipeline.with_params(sampling_params(outcome.state)), outcome.step)
        self.say(f"finished {outcome.step} steps: {paths.root}")
        self.record.finish(Status.finished, step=outcome.step)
        return FINISHED

    def _checkpointer(self, history: ValidationHistory) -> Checkpointer:
        config = self.setup.config.checkpoint
        return Checkpointer(
            self.setup.paths.checkpoints,
            keep=config.keep,
            best=lambda steps: history.best(steps, config.keep_best or 0),
            say=self.say,
            reads_once=self.setup.mesh if config.single_replica_restore else None,
        )

    def _cut_back(self, step: int) -> None:
        """Takes back what is on record of steps that are about to be trained again."""
        paths = self.setup.paths
        self.record.begin(step, truncate_after(paths.metrics, step) if is_first() else ())
        if is_first():
            for grid in paths.samples.glob("*.png"):
                if grid.stem.isdigit() and int(grid.stem) > step:
                    grid.unlink()

    def _validator(
        self, evaluator: Evaluator | None, history: ValidationHistory, sinks: Sequence[MetricSink]
    ) -> Validate:
        if evaluator is None:
            return lambda step, params: None
        return Validator(
            evaluator,
            history,
            self.record,
            sinks,
            say=self.say,
            should_stop=self.stop.agreed,
        )

    def _first_state(self, program: Program, checkpointer: Checkpointer) -> TrainState:
        """In this order: the run's own newest checkpoint, the run it forks, weights, chance."""
        config = self.setup.config
        restored = checkpointer.restore(program.abstract_state)
        if restored is not None:
            self.say(f"continuing from step {restored[0]}")
            return restored[1]
        if config.run.resume is ResumePolicy.must:
            raise NoValidCheckpoint(f"run.resume=must: {checkpointer.folder} holds no checkpoint.")
        if self.fork is not None:
            parent, step = self.fork
            found = restore_step(parent.checkpoints, step, program.abstract_state, say=self.say)
            self.say(f"forked from {parent.root} at step {found[0]}")
            self.record.update(parent=f"{parent.root}@{found[0]}")
            if config.checkpoint.every is not None:  # the fork needs its parent no longer
                checkpointer.save(*found)
            return found[1]
        if self.record.step:
            self.say(
                f"no checkpoint of its {self.record.step} steps was saved; from the start again"
            )
        trained = dict(program.abstract_state.params)
        if config.model.init is Init.random:
            self.say(f"UNet from random weights, the rest from {config.model.pretrained}")
            del trained["unet"]
        return program.init(**self._load(trained))

    def _pipeline(self, program: Program, frozen: Params) -> Pipeline:
        config = self.setup.config
        return make_pipeline(
            program.networks,
            frozen,
            self.setup.tokenizer,
            self.setup.mesh,
            model=config.model,
            diffusion=config.diffusion,
            sampler=resolve.sampler_kind(config),
            tokenizer_folder=self.setup.weights.tokenizer_folder(),
            resolution=resolve.resolution(config),
        )

    def _reporter(self, program: Program, sinks: Sequence[MetricSink]) -> Reporter:
        config = self.setup.config
        workload = Workload(
            batch_size=program.global_batch_size,
            flops=program.flops_per_step,
            num_devices=program.mesh.size,
            peak_tflops=None if config.hardware.simulate else config.hardware.peak_tflops,
        )
        return Reporter(
            every=config.metrics.every,
            max_steps=self.setup.max_steps,
            max_bad_steps=config.train.max_bad_steps,
            meter=StepMeter(workload),
            sinks=sinks,
            progress=self.progress,
            on_row=self.record.progress,
        )

    def _make_sinks(self, first_step: int) -> Sequence[MetricSink]:
        config = self.setup.config
        told = Told(
            self.setup.paths,
            first_step,
            wandb=config.metrics.wandb,
            config=json.loads(redact(json.dumps(plain(asdict(config))))),
            tags=[redact(tag) for tag in config.run.tags],
            say=self.say,
        )
        return make_sinks(config.metrics.sinks, told)

    def _close_sinks(self, exit_code: int) -> None:
        sinks, self.sinks = self.sinks, ()
        for sink in sinks:
            try:
                sink.close(exit_code)
            except Exception as error:
                if exit_code == FINISHED:
                    raise
                self.say(f"{type(sink).__name__}: {error}")  # the start ended for another reason

    def _conclude(self, outcome: Outcome, gallery: Gallery) -> None:
        """What is drawn and judged once, of the last weights."""
        gallery.plot_loss(outcome.step)
        num_prompts = resolve.num_adherence_prompts(self.setup.config)
        if num_prompts:
            adherence = gallery.judge(sampling_params(outcome.state), num_prompts)
            self.record.update(adherence=asdict(adherence))
            self.say(f"adherence: {adherence}")

    def _export(self, pipeline: Pipeline, step: int) -> None:
        """`RUN/export`. All is saved before, so that a failure costs nothing but another start."""
        if process_count() > 1:  # shared between them: all give their part before one writes
            params = tree_to_first_host(pipeline.params, keeps=is_first())
            pipeline = pipeline.with_params(params)
        with self.stop.compiling():  # an upload can take hours: a signal ends it at once
            from_first(lambda: self._write_export(pipeline, step), (ExportFailed,))

    def _write_export(self, pipeline: Pipeline, step: int) -> None:
        setup = self.setup
        try:
            export_at_end(setup.paths, setup.config, pipeline, step, self.say)
        except Exception as error:
            self.log.write(traceback.format_exc())
            again = "goes on from the last checkpoint and tries it again"
            if not _saves(setup.config):
                again = "trains again: checkpoints are off, nothing was saved"
            raise ExportFailed(
                f"all {step} steps are done, but not the export ({error}); the same command {again}"
            ) from error

    def _note_bad_images(self, late: Iterable[BadImage] = ()) -> None:
        """`bad_images.jsonl`: what the scan left out and what became unreadable since, in any
        process."""
        found = gather([asdict(image) for image in late])
        if not is_first():
            return
        path = self.setup.paths.bad_images
        known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        sources = (self.setup.source, self.setup.validation)
        scanned = [image for source in sources for image in getattr(source, "bad_images", ())]
        bad = [*map(asdict, scanned), *(image for images in found for image in images)]
        lines = [json.dumps(image, ensure_ascii=False) for image in bad]
        if lines:
            write_text(path, "\n".join(dict.fromkeys([*known, *lines])) + "\n")

    def _should_stop(self) -> bool:
        if self.record.lost:
            raise FolderLost(
                f"{self.setup.paths.root}: another process took the folder while this one gave "
                "no sign of life; it goes on there, nothing more is written here."
            )
        return self.stop.agreed()

    def _interrupted(self, step: int) -> int:
        what = f"{self._end_in_words()} after step {step}"
        if _saves(self.setup.config):
            self.say(f"{what}, saved; the same command goes on from there")
        else:
            self.say(f"{what}; checkpoints are off, nothing was saved")
        self._close_sinks(EXIT_INTERRUPTED)
        self.record.finish(Status.interrupted, step=step)
        return EXIT_INTERRUPTED

    def interrupted_at_once(self) -> None:
        """Notes that a signal ended the process while it compiled."""
        asked = self.record.asked()
        what = "interrupted" if asked is None else self._end_in_words()
        self.say(f"{what}; the same command goes on from the last checkpoint")
        self.record.finish(Status.interrupted)

    def _stops_when_asked(self) -> AbstractContextManager[object]:
        """Within it a request to stop has the effect of a signal; the first process hears it."""
        if not is_first():
            return nullcontext()
        return StopWatch(self.setup.paths, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def _end_in_words(self) -> str:
        asked = self.record.asked()
        if asked is None:
            return f"interrupted by {self.stop.signal_name}"
        return asked.status.name + (f" ({asked.reason})" if asked.reason else "")


def _saves(config: Config) -> bool:
    return config.checkpoint.every is not None or config.checkpoint.every_minutes is not None


def _headline(setup: Setup) -> str:
    config, devices = setup.config, setup.mesh.devices
    rehearsed = ""
    if config.hardware.simulate:
        rehearsed = f" that stand for hardware={config.hardware.name} (simulated)"
    return (
        f"{config.model.name} on {config.data.kind.name}: {len(setup.source)} examples, "
        f"{setup.max_steps} steps of {config.train.global_batch_size}, "
        f"{devices.size} x {devices.flat[0].device_kind}{rehearsed} -> {setup.paths.root}"
    )
