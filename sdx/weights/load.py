"""A model's tensors, read into our parameters.

Every fault of a component is collected and raised once, with what it probably means.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdx.config.schema import ModelConfig
from sdx.models.attention import dot_product_attention
from sdx.models.module import Params, flat, nested
from sdx.models.networks import make_networks
from sdx.weights.errors import WeightsError
from sdx.weights.model_files import NetworkFiles
from sdx.weights.names import array_from_torch, to_torch
from sdx.weights.tensor_files import Tensors

# What faults probably mean: (regular expression on the line of a fault, explanation).
MEANINGS = (
    (r"^conv_in\.kernel is \(3, 3, 9,", "9 input channels mean an inpainting checkpoint"),
    (r"^conv_in\.kernel is \(3, 3, 8,", "8 input channels mean an image-editing checkpoint"),
    (
        r"attn2\.to_[kv]\.kernel is \(768,",
        "text states of width 768 mean Stable Diffusion 1.x: try model=sd15",
    ),
    (
        r"attn2\.to_[kv]\.kernel is \(1024,",
        "text states of width 1024 mean Stable Diffusion 2.x: try model=sd21 or sd21_base",
    ),
    (
        r"proj_(in|out)\.kernel is \(1, 1, \d+, \d+\) in the file, \(\d+, \d+\)",
        "1x1 convolutions mean 1.x: set model.unet.use_linear_projection=false",
    ),
    (
        r"proj_(in|out)\.kernel is \(\d+, \d+\) in the file, \(1, 1,",
        "linear projections mean 2.x: set model.unet.use_linear_projection=true",
    ),
    (
        r"token_embedding\.embedding is ",
        "another vocabulary: set model.text_encoder.vocab_size to its first number",
    ),
    (r"^add_embedding\.", "these are weights of Stable Diffusion XL, which sdx does not train"),
    (r"lora", "this is a LoRA adapter, not a whole model: give the model it was made for"),
    (
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.",
        "these are names of an original checkpoint: give that .safetensors file itself",
    ),
    (
        r"\.(absmax|quant_map|SCB)\b",
        "these are quantised weights (bitsandbytes): get the model as it was before",
    ),
)


def load_unet(files: NetworkFiles, abstract: Params) -> Params:
    """The UNet's parameters with the types (and shardings, if any) of `abstract`."""
    return _load(files, "unet", abstract)


def load_vae(files: NetworkFiles, abstract: Params) -> Params:
    """The autoencoder's parameters with the types (and shardings, if any) of `abstract`."""
    return _load(files, "vae", abstract)


def load_text_encoder(files: NetworkFiles, abstract: Params) -> Params:
    """The text encoder's parameters with the types (and shardings, if any) of `abstract`."""
    return _load(files, "text_encoder", abstract)


LOADERS = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoder}
"""By the names of the networks, which are those of the components."""


def check_tensors(files: NetworkFiles, model: ModelConfig, components: Iterable[str]) -> None:
    """Raises a WeightsError with all tensors of `components` that do not fit `model`.

    Reads names and shapes only, so that a start can be refused before anything is computed.
    """
    networks = make_networks(model, attention=dot_product_attention, dtype="float32")
    errors = []
    for component in components:
        wanted = flat(getattr(networks, component).abstract())
        try:
            with files.tensors(component) as tensors:
                _check(component, wanted, tensors)
        except WeightsError as error:
            errors.append(error)
    if errors:
        raise WeightsError("\n".join(map(str, errors)))


def read_params(tensors: Tensors, network: str, abstract: Params) -> Params:
    """All of `tensors` as parameters with the types (and shardings, if any) of `abstract`."""
    wanted = flat(abstract)
    _check(network, wanted, tensors)
    return nested({leaf: _place(tensors, leaf, like) for leaf, like in wanted.items()})


def _load(files: NetworkFiles, component: str, abstract: Params) -> Params:
    with files.tensors(component) as tensors:
        return read_params(tensors, component, abstract)


def _check(component: str, wanted: dict[Any, Any], tensors: Tensors) -> None:
    """Raises one WeightsError for all parameters missing, unexpected or of another shape."""
    ours, found = {to_torch(leaf): leaf for leaf in wanted}, tensors.shapes()
    faults = [
        f"{'.'.join(ours[name])} is missing in the file" for name in ours if name not in found
    ]
    faults += [f"{name} is in the file, but not in the model" for name in found if name not in ours]
    for name in (name for name in ours if name in found):
        # A view without memory: only its shape is asked for.
        shape = array_from_torch(name, np.broadcast_to(np.empty(()), found[name])).shape
        if shape != wanted[ours[name]].shape:
            faults.append(
                f"{'.'.join(ours[name])} is {shape} in the file, "
                f"{wanted[ours[name]].shape} in the model"
            )
    if faults:
        hints = [text for pattern, text in MEANINGS if any(re.search(pattern, f) for f in faults)]
        raise WeightsError(
            f"{tensors.path}: {len(faults)} of {len(ours.keys() | found.keys())} arrays of the "
            f"{component} do not fit:",
            faults,
            hints,
        )


def _place(tensors: Tensors, leaf: tuple[str, ...], like: Any) -> jax.Array:
    """One array, cast on the host and put where `like` wants it, each device its own part."""
    name = to_torch(leaf)
    array = array_from_torch(name, tensors.read(name))
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(array.astype(like.dtype))
    placed = jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index].astype(like.dtype, copy=False)
    )
    return placed.block_until_ready()  # transfers under way would keep their arrays on the host
