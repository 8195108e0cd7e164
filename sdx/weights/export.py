"""A model written as diffusers' folder: safetensors under today's names, and the configs beside
them.

The inverse of `configs.py` and `load.py`. Arrays come to the host one at a time, whatever devices
they are spread over.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdx.config.leaves import plain
from sdx.config.schema import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdx.models.module import Params, flat
from sdx.weights.configs import UP_BLOCKS
from sdx.weights.names import array_to_torch, to_torch

DIFFUSERS = "0.42.1"  # whose format this is; later versions read it
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # with safetensors' names
MODEL_FILE = "diffusion_pytorch_model.safetensors"
TEXT_ENCODER_FILE = "model.safetensors"
# What StableDiffusionPipeline is made of, besides the scheduler, whose config says its class.
PARTS = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class ExportError(ValueError):
    """A model that cannot be written as asked."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokenizer, which the text encoder's config repeats."""

    bos: int
    eos: int
    pad: int


def save_model(
    folder: Path,
    params: Params,
    model: ModelConfig,
    *,
    scheduler: Mapping[str, Any],
    tokenizer: Path,
    tokens: SpecialTokens,
    dtype: str = "float32",
) -> None:
    """A whole StableDiffusionPipeline in `folder`, which is there and empty.

    `params` holds `unet`, `vae` and `text_encoder`; `scheduler` is the content of
    scheduler_config.json, `tokenizer` the folder whose files are copied. Raises ExportError for a
    `dtype` that is not one of DTYPES or cannot hold the weights.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype={dtype}: use {', '.join(DTYPES)}.")
    save_unet(params["unet"], model.unet, folder, dtype)
    save_vae(params["vae"], model.vae, folder, dtype, sample_size=model.resolution)
    save_text_encoder(params["text_encoder"], model.text_encoder, folder, dtype, tokens=tokens)
    (folder / "tokenizer").mkdir()
    for file in sorted(path for path in tokenizer.iterdir() if path.is_file()):
        shutil.copyfile(file, folder / "tokenizer" / file.name)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS,
        **PARTS,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "requires_safety_checker": False,
    }
    _write_json(folder / "model_index.json", index)


def save_unet(params: Params, config: UNetConfig, folder: Path, dtype: str) -> None:
    """`folder/unet`, as diffusers' UNet2DConditionModel loads it."""
    down = plain(config.down_block_types)
    described = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS,
        **_fields(config),
        "up_block_types": [UP_BLOCKS[kind] for kind in reversed(down)],
    }
    _save(folder / "unet", MODEL_FILE, params, described, dtype)


def save_vae(
    params: Params, config: VAEConfig, folder: Path, dtype: str, *, sample_size: int
) -> None:
    """`folder/vae`, as diffusers' AutoencoderKL loads it; `sample_size` in pixels."""
    num_levels = len(config.block_out_channels)
    described = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS,
        "sample_size": sample_size,
        **_fields(config),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
    }
    _save(folder / "vae", MODEL_FILE, params, described, dtype)


def save_text_encoder(
    params: Params, config: TextEncoderConfig, folder: Path, dtype: str, *, tokens: SpecialTokens
) -> None:
    """`folder/text_encoder`, as the CLIPTextModel of transformers 5.6 and later loads it."""
    described = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": "float32",  # what it is loaded as unless asked otherwise, like diffusers' parts
        **_fields(config),
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }
    _save(folder / "text_encoder", TEXT_ENCODER_FILE, params, described, dtype)


def _fields(config: Any) -> dict[str, Any]:
    """A config's keys: ours are those of the files. What it lacks has their libraries' default."""
    return {field.name: plain(getattr(config, field.name)) for field in fields(config)}


def _save(
    folder: Path, name: str, params: Params, described: Mapping[str, Any], dtype: str
) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", described)
    _write_tensors(folder / name, params, dtype)


def _write_tensors(path: Path, params: Params, dtype: str) -> None:
    """A safetensors file: the header's length in 8 bytes, the header, the tensors one by one.

    Written here because the library wants all tensors in memory at once.
    """
    leaves = sorted((to_torch(ours), ours, leaf) for ours, leaf in flat(params).items())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, ours, leaf in leaves:
        # A view without memory: only its shape is asked for.
        shape = array_to_torch(ours, np.broadcast_to(np.empty(()), leaf.shape)).shape
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, ours, leaf in leaves:
            file.write(_cast(name, array_to_torch(ours, _on_host(leaf)), dtype).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _on_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """One array whole; of a copy, because JAX keeps what it once brought to the host."""
    if isinstance(leaf, np.ndarray):
        return leaf
    return np.asarray(jax.device_put(leaf, leaf.sharding, may_alias=False))  # compiles nothing


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    if (np.isinf(cast) & ~np.isinf(array)).any():
        largest = np.abs(array).max()
        raise ExportError(
            f"dtype={dtype}: cannot hold {name}, whose largest value is {largest:g}; use bfloat16 "
            "or float32."
        )
    return cast


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
