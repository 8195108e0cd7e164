"""The resize of FID's pictures against torch's, which pytorch-fid uses."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdx.scores.inception_input import inception_input

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (299, 299), (700, 233), (1, 40)])
def test_pictures_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 255
    theirs = torch.nn.functional.interpolate(
        tensor, size=(299, 299), mode="bilinear", align_corners=False
    )
    ours = inception_input(Image.fromarray(pixels))
    np.testing.assert_allclose(ours, (2 * theirs - 1)[0].permute(1, 2, 0).numpy(), atol=1e-5)
