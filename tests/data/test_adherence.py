"""The judge of shapes pictures, on fresh renders."""

import numpy as np
import pytest

from sdx.data.adherence import judge, measure_adherence
from sdx.data.shapes import ShapesSource

pytestmark = pytest.mark.fast


def renders(split: str, num_images: int, resolution: int = 64) -> tuple[np.ndarray, list[str]]:
    source = ShapesSource(1_000_000, resolution, split)
    examples = [source[500_000 + i] for i in range(num_images)]
    return np.stack([e.pixels for e in examples]), [e.captions[0] for e in examples]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_fresh_renders_are_judged_right(split: str) -> None:
    adherence = measure_adherence(*renders(split, 1000))
    assert adherence.colour >= 0.99
    assert adherence.shape >= 0.99


def test_permuted_prompts_fall_to_chance() -> None:
    images, prompts = renders("validation", 1000)
    permuted = [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]
    adherence = measure_adherence(images, permuted)
    assert abs(adherence.colour - 1 / 8) < 0.04
    assert abs(adherence.shape - 1 / 4) < 0.05


def test_survives_blur_tint_and_grain() -> None:
    images, prompts = renders("validation", 300)
    blurred = images.astype(np.float32)
    for axis in (1, 2):
        blurred = (np.roll(blurred, 1, axis) + 2 * blurred + np.roll(blurred, -1, axis)) / 4
    grain = np.random.default_rng(0).normal(0, 8, blurred.shape) + np.array([6, -6, 6])
    worn = np.clip(blurred + grain, 0, 255).astype(np.uint8)
    adherence = measure_adherence(worn, prompts)
    assert adherence.colour >= 0.98
    assert adherence.shape >= 0.98


def test_pictures_without_a_shape_are_never_right() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert judge(noise).shape is None
    flat = judge(np.full((64, 64, 3), 128, np.uint8))
    assert (flat.colour, flat.shape, flat.background) == (None, None, "gray")


def test_other_resolutions_and_backgrounds() -> None:
    images, prompts = renders("train", 100, resolution=96)
    assert measure_adherence(images, prompts).shape >= 0.99
    backgrounds = [judge(image).background for image in images]
    assert all(b in prompt for b, prompt in zip(backgrounds, prompts, strict=True))


def test_unknown_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompt is a caption"):
        measure_adherence(np.zeros((1, 64, 64, 3), np.uint8), ["yoda"])
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        measure_adherence(np.zeros((1, 64, 64, 3), np.uint8), ["yoda", "yoda"])
