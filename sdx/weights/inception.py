"""The weights of FID's Inception, from the file pytorch-fid uses or a .safetensors of it.

That file is `pt_inception-2015-12-05-6726825d.pth` of its releases. Each convolution is followed by
a batch norm whose statistics are fixed, so both are one affine map, which is what is loaded:

    kernel = weight * rate,  bias = shift - mean * rate,  rate = scale / sqrt(variance + 0.001)
"""

import re
from pathlib import Path

import jax
import numpy as np

from sdx.models.module import Params, flat, nested
from sdx.weights.errors import WeightsError
from sdx.weights.tensor_files import Tensors, open_tensors

EPS = 1e-3  # torchvision/models/inception.py, BasicConv2d
PARTS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
# In the file, and no part of the features: the classes, and what training counted.
IGNORED = re.compile(r"^fc\.|\.num_batches_tracked$")
NUM_CLASSES = 1008  # of the network of 2015; torchvision's own has 1000


def load_inception(path: Path, abstract: Params) -> Params:
    """The parameters in `path`, with the types and shardings of `abstract`.

    Raises WeightsError with every tensor that does not fit.
    """
    wanted = flat(abstract)
    modules = list(dict.fromkeys(leaf[:-1] for leaf in wanted))
    with open_tensors(path) as tensors:
        _check(tensors, {module: wanted[(*module, "kernel")].shape for module in modules})
        loaded = {}
        for module in modules:
            kernel, bias = _folded(tensors, ".".join(module))
            loaded[(*module, "kernel")] = kernel
            loaded[(*module, "bias")] = bias
    return nested(
        {
            leaf: jax.device_put(loaded[leaf].astype(like.dtype), like.sharding)
            for leaf, like in wanted.items()
        }
    )


def _folded(tensors: Tensors, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (HWIO) and bias of a convolution and its batch norm, in float64."""
    weight, scale, shift, mean, variance = (
        tensors.read(f"{module}.{part}").astype(np.float64) for part in PARTS
    )
    rate = scale / np.sqrt(variance + EPS)
    return (weight * rate[:, None, None, None]).transpose(2, 3, 1, 0), shift - mean * rate


def _check(tensors: Tensors, kernels: dict[tuple[str, ...], tuple[int, ...]]) -> None:
    found = tensors.shapes()
    classes = found.get("fc.weight", (NUM_CLASSES,))[0]
    if classes != NUM_CLASSES or any(name.startswith("AuxLogits.") for name in found):
        raise WeightsError(
            f"{tensors.path}: an Inception-v3 with {classes} classes is torchvision's, FID is "
            f"defined on TensorFlow's of 2015 with {NUM_CLASSES}; give pytorch-fid's "
            "pt_inception-2015-12-05-6726825d.pth."
        )
    expected: dict[str, tuple[int, ...]] = {}
    for module, (height, width, inputs, outputs) in kernels.items():
        shapes = [(outputs, inputs, height, width), *[(outputs,)] * 4]
        names = (f"{'.'.join(module)}.{part}" for part in PARTS)
        expected |= dict(zip(names, shapes, strict=True))
    faults = [f"{name} is missing in the file" for name in expected if name not in found]
    faults += [
        f"{name} is in the file, but not in the network"
        for name in found
        if name not in expected and not IGNORED.search(name)
    ]
    faults += [
        f"{name} is {found[name]} in the file, {shape} in the network"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise WeightsError(
            f"{tensors.path}: {len(faults)} arrays do not fit FID's Inception-v3; give "
            "pytorch-fid's pt_inception-2015-12-05-6726825d.pth or a .safetensors of it:",
            faults,
        )
