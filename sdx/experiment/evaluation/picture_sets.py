"""Pictures of many prompts, one each, in a folder that an interrupted drawing goes on with.

    FOLDER/drawing.json     what draws them: model, settings, prompts
    FOLDER/metadata.jsonl   each file with its prompt, as data=imagefolder and evaluation read it
    FOLDER/000000.png       the picture of the first prompt

A picture is a function of model, settings and its number, not of the batch it is drawn in.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdx.data.pictures import list_pictures
from sdx.data.source import DataError
from sdx.pipeline import Pipeline
from sdx.record.files import DamagedRecord, read_json, write_json, write_text
from sdx.sampling.denoise import numbered_noise
from sdx.training.pictures import save_png, to_uint8

RECORD, TABLE = "drawing.json", "metadata.jsonl"
_SAY_EVERY_S = 20.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class DrawingSettings:
    """How each picture is drawn."""

    num_steps: int
    guidance_scale: float
    guidance_rescale: float
    negative_prompt: str
    sampler: str
    dtype: str
    seed: int


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank, or the captions of a folder of pictures."""
    if path.is_dir():
        prompts = [picture.caption for picture in list_pictures(path)]
        if None in prompts:
            raise DataError(
                f"--prompts {path}: {prompts.count(None)} of {len(prompts)} pictures have no "
                "caption; give each a row in metadata.jsonl or a .txt file, or give a text file "
                "with one prompt a line."
            )
        return [prompt for prompt in prompts if prompt is not None]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--prompts {path}: cannot be read ({error}); give a UTF-8 text file with one prompt a "
            "line, or a folder of pictures with captions."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"--prompts {path}: holds no prompt; write one a line.")
    return prompts


def drawing_record(
    model: dict[str, Any], pipeline: Pipeline, settings: DrawingSettings, prompts: Sequence[str]
) -> dict[str, Any]:
    """What drawing.json says; `model` tells which one."""
    side, *_ = pipeline.latent_shape
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {
        "model": model,
        "settings": asdict(settings),
        "resolution": side * pipeline.model.vae.factor,
        "num_prompts": len(prompts),
        "prompts_sha256": digest,
    }


def check_folder(folder: Path, record: dict[str, Any]) -> None:
    """Raises DataError unless `folder` is new, empty, or holds pictures drawn as `record` says."""
    fix = "use another --out, or remove that folder"
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder}: is a file, must be a folder; {fix}.")
    try:
        before = read_json(folder / RECORD)
    except DamagedRecord as error:
        raise DataError(f"--out {folder}: {error}") from error
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(f"--out {folder}: holds other files, and no {RECORD}; {fix}.")
        return
    old, new = _flat(before), _flat(record)
    if changes := [
        f"{key} {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]:
        raise DataError(
            f"--out {folder}: holds pictures drawn in another way ({', '.join(changes)}); {fix}."
        )


def draw_missing(
    pipeline: Pipeline,
    prompts: Sequence[str],
    folder: Path,
    settings: DrawingSettings,
    record: dict[str, Any],
    *,
    say: Say,
) -> None:
    """Draws those pictures of `prompts` that `folder` lacks, a batch at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ({"file_name": _name(n), "text": prompt} for n, prompt in enumerate(prompts))
    write_text(folder / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(folder / RECORD, record)
    missing = [n for n in range(len(prompts)) if not (folder / _name(n)).is_file()]
    if len(missing) < len(prompts):
        say(f"{len(prompts) - len(missing)} of {len(prompts)} pictures are in {folder} already")
    start = last_said = time.monotonic()
    for first in range(0, len(missing), pipeline.batch_size):
        numbers = missing[first : first + pipeline.batch_size]
        # As many as ever, so that a last, smaller batch compiles nothing.
        padded = [*numbers, *[numbers[-1]] * (pipeline.batch_size - len(numbers))]
        latents, keys = numbered_noise(settings.seed, padded, pipeline.latent_shape)
        images = pipeline.sample(
            [prompts[n] for n in padded],
            negative_prompts=[settings.negative_prompt],
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            sampler=settings.sampler,
            latents=latents,
            keys=keys,
        )
        for n, image in zip(numbers, to_uint8(images[: len(numbers)]), strict=True):
            save_png(image, folder / _name(n))
        if time.monotonic() - last_said > _SAY_EVERY_S:
            done, last_said = first + len(numbers), time.monotonic()
            rate = done / (last_said - start)
            say(f"drawn {done} of {len(missing)} pictures, {rate:.2f} a second")


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat
