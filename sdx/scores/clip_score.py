"""CLIP score: how well a picture shows what its text says, and how a picture is prepared for it.

Hessel et al. 2021 (arXiv 2104.08718), equation 1, is w · max(cos, 0) with w = 2.5. Here w is 100,
the variant of torchmetrics' `CLIPScore` (which takes the maximum of the mean, not of each picture);
a hundredth of it is the 0.15 of MLPerf's target. Texts are taken as they are: the paper's prefix
"A photo depicts" is not added.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

# OpenAI's (transformers/image_utils.py, OPENAI_CLIP_MEAN and OPENAI_CLIP_STD).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ALWAYS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


class PreprocessorError(ValueError):
    """A preprocessor_config.json that asks for something else than CLIP's preparation."""


def clip_scores(
    images: Float32[np.ndarray, "b p"], texts: Float32[np.ndarray, "b p"]
) -> Float32[np.ndarray, " b"]:
    """100 · max(cos, 0) of each pair of unit vectors."""
    return 100 * np.maximum(np.sum(images * texts, axis=-1), 0)


@dataclass(frozen=True)
class ClipPreparation:
    """What transformers' CLIPImageProcessor does with a picture (its Pillow backend)."""

    size: int
    """Of the shorter side, in pixels."""
    crop: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Float32[np.ndarray, "h w 3"]:
        """The middle of an RGB picture with its shorter side resized, normalised."""
        short = min(picture.size)
        width, height = (int(self.size * side / short) for side in picture.size)
        resized = np.asarray(picture.resize((width, height), self.resample))
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        square = resized[top : top + self.crop, left : left + self.crop]
        pixels = square.astype(np.float32) * np.float32(1 / 255)
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def read_preparation(config: dict[str, Any], image_size: int, place: str) -> ClipPreparation:
    """What preprocessor_config.json (`config`; empty where there is none) asks for.

    Raises PreprocessorError for what is not `size` → crop → scale → normalise, or does not give
    `image_size` pixels.
    """
    faults = [f"{key}=false: must be true" for key in ALWAYS if not config.get(key, True)]
    size = _side(config.get("size", image_size), "shortest_edge")
    crop = _side(config.get("crop_size", image_size), "height")
    if crop != image_size:
        faults.append(f"crop_size={config.get('crop_size')}: must be the network's {image_size}")
    if size is None or size < image_size:
        faults.append(
            f"size={config.get('size')}: must be a shortest_edge of at least {image_size}"
        )
    scale = config.get("rescale_factor", 1 / 255)
    if abs(scale * 255 - 1) > 1e-6:
        faults.append(f"rescale_factor={scale}: must be 1/255")
    if faults:
        raise PreprocessorError(
            f"{place}: {'; '.join(faults)}. Give a CLIP whose pictures are prepared as OpenAI's."
        )
    assert size is not None
    return ClipPreparation(
        size=size,
        crop=image_size,
        resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
        mean=tuple(config.get("image_mean", MEAN)),
        std=tuple(config.get("image_std", STD)),
    )


def _side(value: Any, key: str) -> int | None:
    """A size as configs spell it: a number, or an object that names it."""
    if isinstance(value, dict):
        value = value.get(key)
    return value if isinstance(value, int) else None
