"""A network's weights in few characters, whatever files they lie in."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdx.weights.model_files import NetworkFiles

MOMENTS_TENSORS = ("encoder.", "quant_conv.")
"""Of the autoencoder, what images go through: a model with another decoder has the same moments."""


def weights_digest(
    files: NetworkFiles,
    component: str,
    architecture: Mapping[str, Any],
    prefixes: Sequence[str] = ("",),
) -> str:
    """A hash of the tensors whose names begin with one of `prefixes`, as float32, and of what
    the configuration says of the network; 1.4 GB a second.
    """
    digest = hashlib.sha256(repr(sorted(architecture.items())).encode())
    with files.tensors(component) as tensors:
        for name in sorted(tensors.shapes()):
            if name.startswith(tuple(prefixes)):
                values = np.ascontiguousarray(tensors.read(name), np.float32)
                digest.update(f"{name} {values.shape}".encode())
                digest.update(values.data)
    return digest.hexdigest()[:16]
