"""Pictures as FID's Inception sees them.

This is where tools differ, and with them their numbers (Parmar et al. 2021, arXiv 2104.11222).
Here it is pytorch-fid's way (src/pytorch_fid/inception.py, `forward`): the whole picture, whatever
its shape, is made 299 x 299 in float by torch's `interpolate(mode="bilinear", align_corners=False)`
without antialiasing, so that a large picture is sampled, not averaged; then 0 to 255 becomes −1 to
1. clean-fid and TensorFlow's own graph resize in other ways.
"""

import numpy as np
from jaxtyping import Float32
from PIL import Image

SIDE = 299


def inception_input(picture: Image.Image) -> Float32[np.ndarray, "299 299 3"]:
    """An RGB picture resized, in [-1, 1]."""
    pixels = np.asarray(picture).astype(np.float32) / np.float32(255)
    return 2 * _along(_along(pixels, 0), 1) - 1


def _along(pixels: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation of one axis at the centres of SIDE equal parts; ends are repeated."""
    size = pixels.shape[axis]
    places = (np.arange(SIDE, dtype=np.float32) + np.float32(0.5)) * np.float32(size / SIDE)
    places = np.maximum(places - np.float32(0.5), 0)
    below = np.minimum(places.astype(np.int64), size - 1)
    above = np.minimum(below + 1, size - 1)
    shape = [SIDE if dim == axis else 1 for dim in range(pixels.ndim)]
    part = (places - below).astype(np.float32).reshape(shape)
    first, second = (np.take(pixels, index, axis) for index in (below, above))
    return first * (1 - part) + second * part
