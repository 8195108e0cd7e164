"""What `sdx.evaluate` does once its arguments are read: validation loss, FID, CLIP score.

Everything that can be refused is refused before a picture is drawn; what was found becomes a row of
`RUN/evaluation.jsonl`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sdx.config.compose import from_saved
from sdx.config.errors import ConfigError
from sdx.config.schema import Config, SampleConfig
from sdx.data.adherence import measure_adherence
from sdx.data.shapes import held_out_prompts
from sdx.data.source import DataError
from sdx.diffusion.plans import SamplerError
from sdx.experiment.evaluation.measuring import measure_loss
from sdx.experiment.evaluation.picture_scores import PictureJudge
from sdx.experiment.evaluation.picture_sets import (
    DrawingSettings,
    check_folder,
    draw_missing,
    drawing_record,
    read_prompts,
)
from sdx.experiment.evaluation.request import EvaluationError, Kind, Request, check_request, kind_of
from sdx.experiment.validating import named_step
from sdx.parallel.mesh import local_devices_mesh
from sdx.pipeline import Pipeline, load, load_run
from sdx.record.files import DamagedRecord, now, read_json, write_text
from sdx.record.paths import RunPaths
from sdx.record.provenance import git_commit
from sdx.record.store import AnyPath, StoreError
from sdx.record.validation import Step, parse_run
from sdx.scores.clip_score import PreprocessorError
from sdx.scores.frechet import StatisticsError
from sdx.training.checkpoint import CheckpointMismatch, NoValidCheckpoint
from sdx.training.pictures import to_uint8
from sdx.training.program import BatchError
from sdx.weights.errors import WeightsError

PACKAGES = ("jax", "jaxlib", "numpy", "pillow")
PER_DEVICE = 8  # pictures at once
DTYPE = "float32"

Say = Callable[[str], None]
Row = dict[str, Any]


EVALUATION_FAULTS = (
    EvaluationError,
    ConfigError,
    WeightsError,
    DataError,
    DamagedRecord,
    SamplerError,
    BatchError,
    StatisticsError,
    PreprocessorError,
    NoValidCheckpoint,
    CheckpointMismatch,
)
"""What is wrong with what was given."""
EVALUATION_FAILURES = (StoreError, OSError)


@dataclass(frozen=True)
class _Model:
    """What is evaluated, if it is not a folder of pictures; the run's parts where it is a run."""

    pipeline: Pipeline
    identity: Row
    sample: SampleConfig
    config: Config | None
    paths: RunPaths[Any] | None


def evaluate(request: Request, *, say: Say = print) -> Row:
    """What was found, as `RUN/evaluation.jsonl` has it; raises EVALUATION_FAULTS or _FAILURES."""
    paths, step = parse_run(request.source)
    kind = kind_of(paths)
    check_request(request, kind)
    prompts = None if request.prompts is None else read_prompts(request.prompts)
    mesh = local_devices_mesh()
    batch_size = -(-(request.batch_size or PER_DEVICE * mesh.size) // mesh.size) * mesh.size
    row: Row = {"time": now(), "source": request.source, **_versions()}
    judge = _judge(request, mesh, batch_size, say)
    if kind is Kind.pictures:
        assert judge is not None
        return row | judge(paths.root)
    if kind is Kind.run:
        model = _load_run(paths, step, request, mesh, say)
    else:
        dtype = request.dtype or DTYPE
        pipeline = load(request.source, dtype=dtype, model=request.model, mesh=mesh)
        model = _Model(pipeline, {"source": request.source}, SampleConfig(), None, None)
    pipeline = replace(model.pipeline, batch_size=batch_size)
    model = replace(model, pipeline=pipeline)
    row["model"] = model.identity
    if judge is not None and prompts is not None:
        row |= _draw_and_score(request, model, prompts, judge, say)
    if request.adherence is not None:
        row |= _adherence(request, model, request.adherence)
    if not request.draws:
        row |= _validation(request, model, batch_size, say)
    if model.paths is not None:
        _append(model.paths.evaluation, row)
    return row


def _judge(request: Request, mesh: Mesh, batch_size: int, say: Say) -> PictureJudge | None:
    if not request.scores_pictures:
        return None
    return PictureJudge(
        mesh,
        batch_size,
        reference=request.fid,
        inception=request.inception,
        save_statistics=request.save_statistics,
        clip=request.clip,
        say=say,
    )


def _draw_and_score(
    request: Request, model: _Model, prompts: Sequence[str], judge: PictureJudge, say: Say
) -> Row:
    settings = _settings(request, model)
    record = drawing_record(model.identity, model.pipeline, settings, prompts)
    folder = request.out or _own_folder(model, record)
    check_folder(folder, record)
    draw_missing(model.pipeline, prompts, folder, settings, record, say=say)
    say(f"pictures: {folder}")
    return {"drawing": record} | judge(folder)


def _own_folder(model: _Model, record: Row) -> Path:
    """Where pictures lie unless told: those of other settings lie elsewhere."""
    name = f"evaluation-{hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]}"
    root = None if model.paths is None else model.paths.samples
    return (root if isinstance(root, Path) else Path("samples")) / name


def _settings(request: Request, model: _Model) -> DrawingSettings:
    """What was asked for, and for the rest the run's own `sample.*`."""
    own, asked = model.sample, request
    sampler = asked.sampler or model.pipeline.functions.rule.kind.name
    guidance = own.guidance_scale if asked.guidance is None else asked.guidance
    negative = own.negative_prompt if asked.negative_prompt is None else asked.negative_prompt
    return DrawingSettings(
        num_steps=asked.steps or own.num_steps,
        guidance_scale=float(guidance),
        guidance_rescale=own.guidance_rescale,
        negative_prompt=negative,
        sampler=sampler,
        dtype=request.dtype or DTYPE,
        seed=own.seed if asked.seed is None else asked.seed,
    )


def _adherence(request: Request, model: _Model, count: int) -> Row:
    """As a run of data=shapes is judged at its end."""
    prompts, settings = held_out_prompts(count), _settings(request, model)
    images = model.pipeline.sample(
        prompts,
        negative_prompts=[settings.negative_prompt],
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        sampler=settings.sampler,
        seed=settings.seed,
    )
    found = asdict(measure_adherence(to_uint8(images), prompts))
    return {"adherence": found | {"count": count}, "drawing": {"settings": asdict(settings)}}


def _validation(request: Request, model: _Model, batch_size: int, say: Say) -> Row:
    assert model.config is not None and model.paths is not None
    measured = measure_loss(
        model.config,
        model.pipeline,
        split=request.split,
        num_batches=request.num_batches,
        batch_size=batch_size,
        trained_on=(read_json(model.paths.run) or {}).get("data_fingerprint"),
        say=say,
    )
    return {"validation_loss": measured.pop("loss"), "validation_loss_of": measured}


def _load_run(
    paths: RunPaths[Any], step: Step | None, request: Request, mesh: Mesh, say: Say
) -> _Model:
    config = from_saved(paths.config)
    is_average = config.train.ema if request.weights is None else request.weights == "ema"
    found, pipeline = load_run(
        paths.root,
        dtype=request.dtype or DTYPE,
        which="ema" if is_average else "params",
        step=named_step(paths, request.step if step is None else step),
        mesh=mesh,
    )
    created = (read_json(paths.run) or {}).get("created")
    identity = {"run": paths.root.resolve().name, "created": created, "step": found}
    identity |= {"weights": "ema" if is_average else "raw"}
    say(f"{paths.root}: step {found}, {'averaged' if is_average else 'raw'} weights")
    return _Model(pipeline, identity, config.sample, config, paths)


def _versions() -> Row:
    packages = {name: version(name) for name in PACKAGES}
    return {"sdx": version("sdx"), "git_commit": git_commit(), "packages": packages}


def _append(path: AnyPath, row: Row) -> None:
    """One more line; the file is replaced, since nothing in an object store can be appended to."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_text(path, f"{before}{json.dumps(row, ensure_ascii=False)}\n")
