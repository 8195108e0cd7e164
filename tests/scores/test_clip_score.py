"""CLIP score's arithmetic and preparation against transformers'."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdx.scores.clip_score import PreprocessorError, clip_scores, read_preparation


def test_a_score_is_a_hundred_times_the_cosine_and_never_negative() -> None:
    images = np.array([[1, 0], [0.6, 0.8], [1, 0]], np.float32)
    texts = np.array([[1, 0], [1, 0], [-1, 0]], np.float32)
    np.testing.assert_allclose(clip_scores(images, texts), [100, 60, 0], rtol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (50, 97), (97, 50), (33, 32), (20, 41), (331, 200)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"size": {"shortest_edge": 45}},
    ],
)
def test_pictures_are_prepared_as_transformers_does(
    size: tuple[int, int], settings: dict[str, Any]
) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    wanted: dict[str, Any] = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        **settings,
    }
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
    theirs = CLIPImageProcessorPil(**wanted)(picture, return_tensors="np")["pixel_values"][0]
    ours = read_preparation(wanted, 32, "preprocessor_config.json")(picture)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-6)


def test_openais_preparation_is_the_default() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (300, 260, 3), np.uint8))
    theirs = CLIPImageProcessorPil()(picture, return_tensors="np")["pixel_values"][0]
    ours = read_preparation({}, 224, "none")(picture)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-6)


def test_other_preparations_are_refused_with_all_that_is_wrong() -> None:
    other = {"do_center_crop": False, "size": {"height": 8, "width": 8}, "rescale_factor": 1}
    with pytest.raises(PreprocessorError) as caught:
        read_preparation(other, 224, "clip/preprocessor_config.json")
    for part in ("clip/preprocessor_config.json", "do_center_crop", "shortest_edge", "1/255"):
        assert part in str(caught.value)
