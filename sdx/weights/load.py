"""Folders of weights in diffusers' layout, read into our parameters.

One safetensors file a component; sharded and pickled files are refused by name. Every fault of a
component is collected and raised once, with what it probably means.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sdx.models.module import Params, flat, nested
from sdx.weights.errors import WeightsError
from sdx.weights.names import array_from_torch, current_name, to_torch

EMBEDDED = "tiny"
# The names that are read, the first that is there; fp16 files are cast to the wanted type.
FILE_NAMES = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "text_encoder": ("model.safetensors", "model.fp16.safetensors"),
}
# All that a run reads of a Hub repository: not its pickles, safety checker and other precisions.
HUB_PATTERNS = [
    "*.json",
    "*/*.json",
    "tokenizer/*",
    *(f"{component}/{names[0]}" for component, names in FILE_NAMES.items()),
]
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
        r"proj_(in|out)\.kernel is \(1, 1,",
        "1x1 convolutions mean 1.x: set model.unet.use_linear_projection=false",
    ),
    (
        r"proj_(in|out)\.kernel is \(\d+, \d+\)",
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
        "these are names of the original checkpoint: convert it with diffusers first",
    ),
    (r"^text_projection\.", "CLIP with its projection: save the plain text encoder instead"),
)


def resolve_folder(source: str) -> Path:
    """The local folder of `model.pretrained`; a Hub id is downloaded."""
    if source == EMBEDDED:
        return Path(str(files("sdx"))) / "assets" / EMBEDDED
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise WeightsError(
            f"model.pretrained={source}: no such folder; give a folder that holds unet/, vae/ and "
            f"text_encoder/, a Hub id such as OWNER/NAME, or {EMBEDDED}."
        )
    return _download(source)


def load_unet(folder: Path, abstract: Params) -> Params:
    """The UNet's parameters with the types (and shardings, if any) of `abstract`."""
    return _load(folder, "unet", abstract)


def load_vae(folder: Path, abstract: Params) -> Params:
    """The autoencoder's parameters with the types (and shardings, if any) of `abstract`."""
    return _load(folder, "vae", abstract)


def load_text_encoder(folder: Path, abstract: Params) -> Params:
    """The text encoder's parameters with the types (and shardings, if any) of `abstract`."""
    return _load(folder, "text_encoder", abstract)


def read_scheduler_config(folder: Path) -> dict[str, Any]:
    """The file that says how the model was trained: betas, prediction type."""
    return read_json(folder / "scheduler" / "scheduler_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; a WeightsError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not an object.")
    return found


def _load(folder: Path, component: str, abstract: Params) -> Params:
    path = _weights_file(folder / component, FILE_NAMES[component])
    wanted = flat(abstract)
    try:
        with safe_open(path, "numpy") as file:
            names = {
                current: name
                for name in file.keys()  # noqa: SIM118 (not a dict)
                if (current := current_name(component, name)) is not None
            }
            _check(path, component, wanted, file, names)
            return nested({leaf: _place(file, names, leaf, like) for leaf, like in wanted.items()})
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); get it again.") from error


def _weights_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".safetensors"))
    reason = f"found {', '.join(others)}" if others else "found no weights there"
    if any(folder.glob("*.index.json")):
        reason += "; weights in several files are not read: save them with a larger max_shard_size"
    elif any(name.endswith(".bin") for name in others):
        reason += "; pickles are never opened: save with safe_serialization=True"
    raise WeightsError(f"{folder}: needs {names[0]}; {reason}.")


def _check(
    path: Path, component: str, wanted: dict[Any, Any], file: Any, names: dict[str, str]
) -> None:
    """Raises one WeightsError for all parameters missing, unexpected or of another shape."""
    ours = {to_torch(leaf): leaf for leaf in wanted}
    faults = [
        f"{'.'.join(ours[name])} is missing in the file" for name in ours if name not in names
    ]
    faults += [f"{name} is in the file, but not in the model" for name in names if name not in ours]
    for name in (name for name in ours if name in names):
        torch_shape = file.get_slice(names[name]).get_shape()
        # A view without memory: only its shape is asked for.
        shape = array_from_torch(name, np.broadcast_to(np.empty(()), torch_shape)).shape
        if shape != wanted[ours[name]].shape:
            faults.append(
                f"{'.'.join(ours[name])} is {shape} in the file, "
                f"{wanted[ours[name]].shape} in the model"
            )
    if faults:
        hints = [text for pattern, text in MEANINGS if any(re.search(pattern, f) for f in faults)]
        raise WeightsError(
            f"{path}: {len(faults)} of {len(ours.keys() | names.keys())} arrays of the {component} "
            f"do not fit:",
            faults,
            hints,
        )


def _place(file: Any, names: dict[str, str], leaf: tuple[str, ...], like: Any) -> jax.Array:
    """One array, cast on the host and put where `like` wants it."""
    name = to_torch(leaf)
    array = array_from_torch(name, file.get_tensor(names[name])).astype(like.dtype)
    sharding = getattr(like, "sharding", None)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _download(source: str) -> Path:
    # Imported here: it costs 0.3 s, and local runs never need it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the Hub's client raises OSError, ValueError and httpx errors alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"model.pretrained={source}: no folder of that name here, and it could not be had from "
            f"the Hub ({reason}); check the name, log in with `hf auth login`, or give a folder."
        ) from error
