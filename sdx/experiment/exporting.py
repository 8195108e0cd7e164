"""A trained model as a folder for the world: weights, model card, pictures, record, and the upload.

`export` is what the command does; `export_at_end` and `complete_export` are a run's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from sdx.config import resolve
from sdx.config.compose import from_saved
from sdx.config.errors import ConfigError
from sdx.config.schema import Config
from sdx.data.source import DataError
from sdx.diffusion.plans import SamplerError
from sdx.experiment.model_card import EXAMPLE_PROMPT, GRID, Trained, model_card
from sdx.experiment.publishing import PublishError, publish
from sdx.experiment.validating import named_step
from sdx.experiment.verifying import NotTheSame, check_can_verify, verify
from sdx.pipeline import Pipeline, load, load_run
from sdx.record.files import DamagedRecord, now, read_json, write_json, write_text
from sdx.record.metrics import read_metrics
from sdx.record.paths import RunPaths
from sdx.record.store import AnyPath, as_path
from sdx.record.validation import Step
from sdx.training.checkpoint import CheckpointMismatch, NoValidCheckpoint
from sdx.weights.errors import WeightsError
from sdx.weights.export import ExportError
from sdx.weights.export_folder import check_replaceable, export_folder, exported

EXPORT_FAULTS = (
    ExportError,
    ConfigError,
    WeightsError,
    DataError,
    SamplerError,
    DamagedRecord,
    NoValidCheckpoint,
    CheckpointMismatch,
)
"""What is refused before anything is written."""
EXPORT_FAILURES = (NotTheSame, PublishError, OSError)
"""What goes wrong later: the judge, the Hub or the disk."""
Weights = Literal["ema", "raw"]
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class _Model:
    """What is exported: a pipeline, and what is known about it."""

    pipeline: Pipeline
    name: str
    of: str
    """Only an earlier export of the same may be replaced."""
    source: str
    trained: Trained | None


def export(
    source: str,
    folder: AnyPath,
    *,
    weights: Weights | None = None,
    step: Step | None = None,
    dtype: str = "float32",
    verifies: bool = False,
    hub_id: str | None = None,
    named: str | None = None,
    say: Say = print,
) -> None:
    """Writes a run's model, or any other that `sdx.load` takes, to `folder`; uploads nothing.

    `weights` None is the average where the run keeps one, `step` None its newest checkpoint,
    "best" that of lowest validation loss. The
    card is written for `hub_id`, if it will go there; `named` is the option of conf/model that an
    original file is. Raises one of EXPORT_FAULTS, or NotTheSame where diffusers draws another
    picture from it; `folder` is as it was then.
    """
    if verifies:
        check_can_verify(dtype)
    paths = RunPaths(as_path(source))
    if paths.config.is_file() and named is None:
        check_replaceable(folder, _of(paths))  # before the minutes that loading can take
        model = _load_run(paths, weights, named_step(paths, step))
    elif weights is None and step is None:
        name = paths.root.name
        check_replaceable(folder, name)
        model = _Model(load(source, model=named), name, of=name, source=source, trained=None)
    else:
        raise ExportError(f"--weights, --step: {source} is not a run of sdx; leave them out.")
    difference = _write(model, folder, dtype=dtype, hub_id=hub_id, verifies=verifies)
    if difference is not None:
        say(f"verified: diffusers draws the same picture, within {difference:.2g} of 255")


def export_at_end(paths: RunPaths, config: Config, pipeline: Pipeline, step: int, say: Say) -> None:
    """`RUN/export` of the model as it is after the last step, and its upload if configured.

    Raises OSError, ExportError or PublishError; what is done is noted in run.json.
    """
    model = _model_of_run(paths, config, pipeline, step, is_average=config.train.ema)
    # What lies in a run's own folder is its own, also where the folder was renamed or copied.
    model = replace(model, of=exported(paths.export).get("of", model.of))
    hub_id = config.export.hub_model_id if config.export.push_to_hub else None
    _write(model, paths.export, hub_id=hub_id)
    say(f"exported: {paths.export}")
    if hub_id is not None:
        address = publish(paths.export, hub_id, title=f"{paths.root.name}, step {step}", say=say)
        say(f"uploaded: {address}")
        uploaded = {"hub_model_id": hub_id, "step": step, "commit": address}
        write_json(paths.run, {**(read_json(paths.run) or {}), "uploaded": uploaded})


def is_export_due(paths: RunPaths, config: Config, step: int) -> bool:
    """Whether a finished run lacks the export of `step`, or the upload of it."""
    if not config.export.at_end:
        return False
    uploaded = (read_json(paths.run) or {}).get("uploaded") or {}
    wanted = {"hub_model_id": config.export.hub_model_id, "step": step}
    is_up = not config.export.push_to_hub or wanted.items() <= uploaded.items()
    return not is_up or exported(paths.export).get("step") != step


def complete_export(paths: RunPaths, config: Config, say: Say) -> None:
    """`export_at_end` of a run that is finished, from its newest checkpoint."""
    model = _load_run(paths, None, None)
    assert model.trained is not None
    export_at_end(paths, config, model.pipeline, model.trained.step, say)


def _load_run(paths: RunPaths, weights: Weights | None, step: int | None) -> _Model:
    config = from_saved(paths.root)
    is_average = config.train.ema if weights is None else weights == "ema"
    found, pipeline = load_run(paths.root, which="ema" if is_average else "params", step=step)
    return _model_of_run(paths, config, pipeline, found, is_average=is_average)


def _model_of_run(
    paths: RunPaths, config: Config, pipeline: Pipeline, step: int, *, is_average: bool
) -> _Model:
    record, rows = read_json(paths.run) or {}, read_metrics(paths.metrics)
    is_drawn = is_average == config.train.ema  # pictures are of the average, where there is one
    is_judged = resolve.num_adherence_prompts(config) > 0 and (not rows or rows[-1]["step"] <= step)
    grid = paths.samples / f"{step:07d}.png"
    trained = Trained(
        config=config,
        record=record,
        rows=[row for row in rows if row["step"] <= step],
        step=step,
        is_average=is_average,
        grid=grid if is_drawn and grid.is_file() else None,
        adherence=record.get("adherence") if is_drawn and is_judged else None,
    )
    name = paths.root.resolve().name
    return _Model(pipeline, name, _of(paths), config.model.pretrained, trained)


def _write(
    model: _Model,
    folder: AnyPath,
    *,
    dtype: str = "float32",
    hub_id: str | None = None,
    verifies: bool = False,
) -> float | None:
    """The folder, whole or not at all; what `verify` measured."""
    trained = model.trained
    record: dict[str, Any] = {"of": model.of, "dtype": dtype, "exported": now()}
    if trained is not None:
        record |= {"step": trained.step, "weights": "ema" if trained.is_average else "raw"}
    with export_folder(folder, record) as draft:
        model.pipeline.write_files(draft, dtype=dtype)
        if trained is not None and trained.grid is not None:
            (draft / GRID).write_bytes(trained.grid.read_bytes())
        address = hub_id or folder.resolve().name
        card = model_card(model.name, address, model.source, dtype=dtype, trained=trained)
        write_text(draft / "README.md", card)
        if not verifies:
            return None
        prompts = trained.config.sample.prompts if trained is not None else []
        return verify(draft, model.pipeline, (prompts or [EXAMPLE_PROMPT])[0])


def _of(paths: RunPaths) -> str:
    """The run; another one of the same name is told apart."""
    created = (read_json(paths.run) or {}).get("created")
    return f"{paths.root.resolve().name}, run of {created}"
