"""`run.*`, `checkpoint.*`, `export.*`, `metrics.*`, `eval.*`, `profiler.*`: what runs leave behind.

Two runs of eight steps serve all rows: `PLAIN`, and one with everything changed at once; a third
goes on from the first.
"""

import io
import json
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from pytest import approx

from sdx.config.schema import Cache, Sink
from sdx.experiment import exporting, setup
from sdx.experiment import gallery as galleries
from sdx.experiment.attempt import Attempt
from sdx.experiment.run import run
from sdx.experiment.setup import prepare, run_paths
from sdx.parallel.sharding import replicated
from sdx.parallel.xla_flags import FRACTION
from sdx.record.metrics import read_metrics
from sdx.record.paths import RunPaths
from sdx.record.validation import ValidationHistory
from sdx.training import checkpoint, profile, wandb_sink
from sdx.training.checkpoint import Checkpointer
from sdx.training.evaluation import Evaluator, ValidationLoss
from sdx.training.metrics import ProgressLine, TooManyBadSteps
from sdx.training.profile import StepTracer
from sdx.training.sinks import Told, make_sinks
from tests.effects.cached import CACHED, made
from tests.effects.effect import Case, Effect
from tests.effects.reads import recorded
from tests.effects.tracing import Observer

PLAIN = (
    "run.output_dir={files}/runs",
    "run.name=plain",
    "train.max_steps=8",
    "checkpoint.every=1",
    "metrics.every=1",
    "eval.every=4",
    "eval.num_batches=3",
    "sample.prompts=[a red circle]",
    "sample.num_steps=1",
)
CHANGES = {
    "run.name": "changed",
    "run.tags": "[one,two]",
    "checkpoint.every": "2",
    "checkpoint.keep": "2",
    "checkpoint.keep_best": "1",
    "metrics.every": "4",
    "metrics.sinks": "[jsonl]",
    "eval.every": "2",
    "eval.num_batches": "2",
    "eval.num_buckets": "4",
    "sample.every": "3",
    "sample.num_adherence_prompts": "5",
    "export.push_to_hub": "true",
    "export.hub_model_id": "me/model",
    "profiler.enabled": "true",
    "hardware.peak_tflops": "2.0",
}
CHANGED = (
    *(f"{key}={value}" for key, value in CHANGES.items()),
    "profiler.skip_steps=3",
    "profiler.steps=2",
)
FORK = (
    *CACHED,
    "run.name=fork",
    "run.resume_from={files}/runs/plain@6",
    "checkpoint.every=null",
    "checkpoint.every_minutes=1e-6",
    "export.at_end=false",
)


@dataclass
class Finished:
    """A run that ended well, and what it did that its folder does not tell."""

    paths: RunPaths
    output: str
    saved: list[int] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    num_judged: int = 0
    num_measured: int = 0

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.paths.run.read_text())

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of metrics that hold this one."""
        return [row for row in read_metrics(self.paths.metrics) if name in row]


@cache
def finished(case: Case) -> Finished:
    """The run of a case; the folder its name says must be free."""
    if case.config.run.resume_from is not None:
        finished(case.other(PLAIN))
    if case.config.data.cache is not Cache.none:
        made(case.other(CACHED))
    found = Finished(run_paths(case.config), "")
    save, judge, measure = Checkpointer.save, galleries.measure_adherence, Evaluator.__call__

    def noted_save(self: Checkpointer, step: int, state: Any) -> None:
        found.saved.append(step)
        save(self, step, state)

    def noted_judge(images: Any, prompts: Sequence[str]) -> Any:
        found.num_judged = len(prompts)
        return judge(images, prompts)

    def rising(self: Evaluator, params: Any, should_stop: Any) -> ValidationLoss | None:
        """Every loss is above the one before, so that the best is known."""
        loss = measure(self, params, should_stop)
        found.num_measured += 1
        return loss and replace(loss, loss=loss.loss + found.num_measured)

    def upload(folder: Path, hub_id: str, **_: Any) -> str:
        found.uploads.append(hub_id)
        return f"https://hub/{hub_id}"

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(Checkpointer, "save", noted_save)
        patch.setattr(galleries, "measure_adherence", noted_judge)
        patch.setattr(Evaluator, "__call__", rising)
        patch.setattr(exporting, "publish", upload)
        patch.setattr(setup, "check_can_publish", lambda hub_id: None)
        patch.setenv(FRACTION, "0.5")  # means nothing on a CPU; it is to be found in run.json
        with recorded() as found.reads:
            code = run(case.config, case.overrides)
    found.output = said.getvalue()
    assert code == 0, found.output
    return found


def saved(case: Case) -> list[int]:
    """Steps that were saved."""
    return finished(case).saved


def kept(case: Case) -> list[int]:
    """Steps that are on disk."""
    return sorted(int(path.name) for path in finished(case).paths.checkpoints.iterdir())


def num_newest(case: Case) -> int:
    """How many of the newest steps that were saved are on disk, without a gap."""
    newest = finished(case).saved[::-1]
    return next(count for count, step in enumerate(newest) if step not in kept(case))


def older_kept(case: Case) -> list[int]:
    """Steps on disk that are not among those, and are the best measured."""
    losses = {
        int(step): loss for step, loss in finished(case).record["validation"]["losses"].items()
    }
    older = kept(case)[: -num_newest(case)]
    best = sorted((step for step in losses if step in saved(case)), key=losses.__getitem__)
    assert set(older) <= set(best[: len(older)]), losses
    return older


def steps_with(name: str) -> Observer:
    """Steps whose row of metrics holds this one."""
    return lambda case: [row["step"] for row in finished(case).rows(name)]


def validation_names(case: Case) -> list[str]:
    """Of the losses of parts of the schedule."""
    row = finished(case).rows("validation_loss")[0]
    return sorted(name for name in row if name.startswith("validation_loss_"))


def num_measured(case: Case) -> str:
    """Examples of the validation loss."""
    return finished(case).record["validation"]["of"].partition("[")[2]


def grids(case: Case) -> list[int]:
    """Steps whose pictures are there."""
    return sorted(int(path.stem) for path in finished(case).paths.samples.glob("*.png"))


def sinks(case: Case) -> set[str]:
    """Where metrics are."""
    paths = finished(case).paths
    places = {"jsonl": paths.metrics, "tensorboard": paths.tensorboard}
    return {name for name, place in places.items() if place.exists()}


def peak(case: Case) -> float | None:
    """TFLOP/s that the share of them is of."""
    row = finished(case).rows("loss")[-1]
    return row["tflops_per_device"] / row["mfu"] if "mfu" in row else None


def start_again(case: Case) -> tuple[int, bool]:
    """Exit code of another start in the folder of a finished run, and whether it says so."""
    finished(case.other(PLAIN))
    said = io.StringIO()
    with redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", said)
        code = run(case.config, case.overrides)
    return code, "is finished" in said.getvalue()


def first_step(case: Case) -> int:
    """The step that a start begins at."""
    return json.loads((finished(case).paths.attempts / "1.json").read_text())["first_step"]


def devices_read_onto(case: Case) -> int:
    """How many devices a checkpoint's files are read for; the others are sent the arrays."""
    attempt: Any = SimpleNamespace(
        setup=SimpleNamespace(
            config=case.config, mesh=case.mesh, paths=RunPaths(case.folder / "restored")
        ),
        say=print,
    )
    place = replicated(case.mesh)
    state = {"step": jax.device_put(jnp.int32(1), place), "a": jax.device_put(jnp.ones(3), place)}
    found: list[int] = []
    read = checkpoint._read_arrays

    def noted(path: Path, wanted: Any, processes: set[int]) -> Any:
        found.append(len(wanted["a"].sharding.device_set))
        return read(path, wanted, processes)

    with closing(Attempt._checkpointer(attempt, ValidationHistory())) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "_read_arrays", noted)
            assert checkpointer.restore(abstract) is not None
    return found[0]


def bad_steps_until_the_end(case: Case) -> int:
    """Updates in a row that may fail, of a hundred that do."""
    attempt: Any = SimpleNamespace(
        setup=case.setup,
        progress=ProgressLine(100, out=io.StringIO()),
        record=SimpleNamespace(progress=lambda step: None),
    )
    reporter = Attempt._reporter(attempt, case.program, [])
    for count in range(1, 100):
        values = {"loss": jnp.nan, "bad": 1, "bad_in_a_row": count}
        try:
            reporter.report(count, {name: jnp.float32(one) for name, one in values.items()})
        except TooManyBadSteps:
            return count
    return 100


def traced_steps(case: Case) -> list[int]:
    """Steps of a run of ten that are in its trace."""
    found: list[int] = []

    def annotate(name: str, step_num: int) -> Any:
        found.append(step_num)
        return nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "start_trace", lambda folder: None)
        patch.setattr(jax.profiler, "stop_trace", lambda: None)
        patch.setattr(profile.jax.profiler, "StepTraceAnnotation", annotate)
        tracer = StepTracer(case.config.profiler, case.folder, lambda text: None)
        for step in range(1, 11):
            tracer.step(step)
            tracer.done(jnp.zeros(()))
    return found


def wandb_run(case: Case) -> dict[str, Any]:
    """Where W&B is told to put a run."""
    told: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        told.update(options)
        return SimpleNamespace(url=None, step=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_sink.wandb, "init", init)
        paths = RunPaths(case.folder / "wandb")
        make_sinks([Sink.wandb], Told(paths, 1, wandb=case.config.metrics.wandb))
    return {name: told[name] for name in ("project", "entity")}


def num_traces(case: Case) -> int:
    """Files that TensorBoard's profile plugin reads."""
    return len(list(finished(case).paths.root.glob("profile/*/plugins/profile/*/*.xplane.pb")))


def compilation_cache(case: Case) -> str:
    """The folder that JAX keeps programs in after a start."""
    prepare(case.config)
    return Path(jax.config.values["jax_compilation_cache_dir"]).name


def changed(path: str, observe: Observer, before: Any, after: Any) -> Effect:
    """A row of the run with everything changed."""
    return Effect(path, CHANGES[path], observe, before, after, given=PLAIN, along=CHANGED)


def forked(path: str, value: str, observe: Observer, before: Any, after: Any) -> Effect:
    """A row of the run that goes on from the plain one."""
    return Effect(path, value, observe, before, after, given=PLAIN, along=FORK)


WANDB = ("metrics.sinks=[wandb,jsonl]",)
TRACED = ("profiler.enabled=true",)

EFFECTS = [
    Effect(
        "run.name",
        "mine",
        lambda case: case.setup.paths.root.name,
        "run",
        "mine",
        given=("run.name=run",),
    ),
    Effect(
        "run.output_dir",
        "{files}/elsewhere",
        lambda case: case.setup.paths.root.parent.name,
        "runs",
        "elsewhere",
        given=("run.output_dir={files}/runs",),
    ),
    changed(
        "run.tags", lambda case: finished(case).record["config"]["run.tags"], [], ["one", "two"]
    ),
    Effect("run.resume", "never", start_again, (0, True), (2, False), given=PLAIN),
    forked("run.resume_from", "{files}/runs/plain@6", first_step, 0, 6),
    Effect(
        "run.compilation_cache_dir",
        "{files}/compiled",
        compilation_cache,
        Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).name,
        "compiled",
    ),
    changed("checkpoint.every", saved, [1, 2, 3, 4, 5, 6, 7, 8], [2, 4, 6, 8]),
    forked("checkpoint.every_minutes", "1e-6", saved, [1, 2, 3, 4, 5, 6, 7, 8], [7, 8]),
    changed("checkpoint.keep", num_newest, 3, 2),
    changed("checkpoint.keep_best", older_kept, [], [2]),
    Effect(
        "checkpoint.single_replica_restore",
        "true",
        devices_read_onto,
        2,
        1,
        given=("hardware.num_devices=2", "mesh=dp"),
    ),
    changed("metrics.every", steps_with("loss"), [1, 2, 3, 4, 5, 6, 7, 8], [4, 8]),
    changed("metrics.sinks", sinks, {"jsonl", "tensorboard"}, {"jsonl"}),
    Effect(
        "metrics.wandb.project",
        "mine",
        wandb_run,
        {"project": "sdx", "entity": None},
        {"project": "mine", "entity": None},
        given=WANDB,
    ),
    Effect(
        "metrics.wandb.entity",
        "us",
        wandb_run,
        {"project": "sdx", "entity": None},
        {"project": "sdx", "entity": "us"},
        given=WANDB,
    ),
    changed("hardware.peak_tflops", peak, None, approx(2.0, rel=1e-3)),
    changed("eval.every", steps_with("validation_loss"), [4, 8], [2, 4, 6, 8]),
    changed("eval.num_batches", num_measured, ":12]", ":8]"),  # batches of 4
    changed(
        "eval.num_buckets",
        validation_names,
        [f"validation_loss_{part}" for part in range(10)],
        [f"validation_loss_{part}" for part in range(4)],
    ),
    changed("sample.every", grids, [8], [3, 6, 8]),
    changed("sample.num_adherence_prompts", lambda case: finished(case).num_judged, 0, 5),
    forked(
        "export.at_end", "false", lambda case: finished(case).paths.export.is_dir(), True, False
    ),
    changed("export.push_to_hub", lambda case: finished(case).uploads, [], ["me/model"]),
    changed("export.hub_model_id", lambda case: finished(case).uploads, [], ["me/model"]),
    changed("profiler.enabled", num_traces, 0, 1),
    Effect(
        "profiler.skip_steps", "4", traced_steps, [3, 4, 5, 6, 7], [5, 6, 7, 8, 9], given=TRACED
    ),
    Effect("profiler.steps", "2", traced_steps, [3, 4, 5, 6, 7], [3, 4], given=TRACED),
    Effect("train.max_bad_steps", "3", bad_steps_until_the_end, 10, 3),
]
