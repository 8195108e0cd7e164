"""Pictures on demand: what `sdx.sample` does once its arguments are read."""

import re
from collections.abc import Sequence
from pathlib import Path

from sdx.config.compose import from_saved
from sdx.config.errors import ConfigError
from sdx.config.schema import SampleConfig
from sdx.data.source import DataError
from sdx.diffusion.plans import SamplerError
from sdx.experiment.validating import named_step
from sdx.pipeline import load, load_run
from sdx.record.store import AnyPath, StoreError
from sdx.record.validation import parse_run
from sdx.training.checkpoint import CheckpointMismatch, NoValidCheckpoint
from sdx.training.pictures import make_grid, save_png, to_uint8
from sdx.weights.errors import WeightsError


class DrawingError(ValueError):
    """Pictures cannot be put where they were asked for."""


DRAWING_FAULTS = (
    DrawingError,
    ConfigError,
    WeightsError,
    DataError,
    SamplerError,
    NoValidCheckpoint,
    CheckpointMismatch,
    StoreError,
)
_MAX_NAME = 60  # letters of the prompt in a file's name


def draw(
    source: str,
    prompts: Sequence[str],
    *,
    negative_prompt: str | None,
    num_images: int,
    num_steps: int | None,
    guidance_scale: float | None,
    sampler: str | None,
    seed: int,
    out: AnyPath | None,
    model: str | None,
) -> AnyPath:
    """The folder with `grid.png` and a PNG for each prompt and number; raises DRAWING_FAULTS.

    RUN@STEP and RUN@best are checkpoints of a run. What is None is the run's own `sample.*`, or the
    schema's default for a model folder; `sampler` the run's or the folder's own. `model` is what an
    original file is, where it does not tell.
    """
    paths, step = parse_run(source)
    is_run = paths.config.is_file()
    folder = out or (paths.samples / "drawn" if is_run else Path("samples"))
    own = from_saved(paths.config).sample if is_run else SampleConfig()
    if is_run and step is not None:
        pipeline = load_run(paths.root, step=named_step(paths, step))[1]
    else:
        pipeline = load(source, model=model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DrawingError(f"--out {folder}: cannot be made ({error.strerror}).") from error
    wanted = [prompt for prompt in prompts for _ in range(num_images)]
    images = pipeline.sample(
        wanted,
        negative_prompts=[own.negative_prompt if negative_prompt is None else negative_prompt],
        num_steps=num_steps or own.num_steps,
        guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
        guidance_rescale=own.guidance_rescale,
        sampler=sampler,
        seed=seed,
    )
    pictures = to_uint8(images)
    for index, (prompt, picture) in enumerate(zip(wanted, pictures, strict=True)):
        save_png(picture, folder / f"{index:03d}-{_file_name(prompt)}.png")
    save_png(make_grid(pictures, wanted), folder / "grid.png")
    return folder


def _file_name(prompt: str) -> str:
    """The prompt's letters and digits, safe in any file system."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_MAX_NAME].strip("-") or "empty"
