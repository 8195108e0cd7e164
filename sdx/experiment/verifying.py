"""Whether diffusers draws from an export what sdx draws: the proof of `--verify`."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from sdx.config.schema import SamplerKind
from sdx.pipeline import Pipeline
from sdx.sampling.denoise import initial_latents
from sdx.weights.export import ExportError

TOLERANCE = 2.0  # of 255
NUM_STEPS = 10
GUIDANCE_SCALE = 7.5
NEEDED = ("torch", "diffusers", "transformers")


class NotTheSame(RuntimeError):
    """diffusers draws something else from the export."""


def check_can_verify(dtype: str) -> None:
    """Raises ExportError where there is no judge, or nothing that it could judge exactly."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--verify: {' and '.join(missing)} not installed here, so diffusers cannot be asked; "
            f"pip install {' '.join(missing)}, or leave --verify out."
        )
    if dtype != "float32":
        raise ExportError(
            f"--verify: compares pictures drawn in float32, not from --dtype {dtype}; verify with "
            "--dtype float32."
        )


def verify(folder: Path, pipeline: Pipeline, prompt: str) -> float:
    """Largest difference, in steps of 255, between diffusers' picture and ours of `prompt`.

    Both start from the same latents; DDPM's place is taken by DDIM. Raises NotTheSame above
    TOLERANCE.
    """
    latents = initial_latents(0, (1, *pipeline.latent_shape))
    is_random = pipeline.functions.rule.kind is SamplerKind.ddpm  # each library has its own noise
    theirs = _drawn_by_diffusers(folder, prompt, latents, with_ddim=is_random)
    ours = pipeline.sample(
        [prompt],
        num_steps=NUM_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        sampler="ddim" if is_random else None,
        latents=latents,
    )
    difference = float(np.abs(np.clip(ours / 2 + 0.5, 0, 1) - theirs).max() * 255)
    if not difference <= TOLERANCE:  # NaN is not
        raise NotTheSame(
            f"--verify: diffusers' picture of {prompt!r} differs by {difference:.3g} of 255, "
            f"allowed {TOLERANCE:g}; nothing was exported. Where this machine computes float32 "
            "with fewer bits (GPU, TPU), try again with JAX_PLATFORMS=cpu."
        )
    return difference


def _drawn_by_diffusers(
    folder: Path, prompt: str, latents: np.ndarray, *, with_ddim: bool
) -> np.ndarray:
    """One picture from 0 to 1, NHWC."""
    with warnings.catch_warnings(action="ignore"):  # the libraries' own
        torch: Any = importlib.import_module("torch")
        diffusers: Any = importlib.import_module("diffusers")
        for library in ("transformers", "diffusers"):
            logging: Any = importlib.import_module(f"{library}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        judge = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True
        )
        judge.set_progress_bar_config(disable=True)
        if with_ddim:
            judge.scheduler = diffusers.DDIMScheduler.from_config(judge.scheduler.config)
        return judge(
            prompt,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            output_type="np",
        ).images
