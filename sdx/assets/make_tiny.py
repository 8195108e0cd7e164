"""Makes the embedded model again: `python -m sdx.assets.make_tiny --out FOLDER`.

Trains the autoencoder and the text encoder that `model=tiny` describes on `data=shapes`, and writes
them with tokenizer, scheduler and UNet configuration as a folder diffusers loads. The UNet has no
weights there: it is what `sdx.train` trains. A function of the seed; ten minutes on a CPU core.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sdx.assets.make_text_encoder import train_text_encoder
from sdx.assets.make_tokenizer import write_tokenizer
from sdx.assets.make_vae import reconstruction_error, train_vae
from sdx.config.compose import compose
from sdx.config.schema import Config, DownBlock
from sdx.data.tokenizer import load_tokenizer
from sdx.models.module import Params, flat
from sdx.weights.names import array_to_torch, to_torch

VAE_STEPS = 5500
TEXT_ENCODER_STEPS = 250
DIFFUSERS_VERSION = "0.42.1"
"""Written into the configs: the version whose loading of them is tested."""
UP_BLOCKS = {
    DownBlock.CrossAttnDownBlock2D: "CrossAttnUpBlock2D",
    DownBlock.DownBlock2D: "UpBlock2D",
}


def make_tiny(
    folder: Path, *, seed: int, vae_steps: int, text_encoder_steps: int, say: Callable[[str], None]
) -> None:
    """Trains the parts of `model=tiny` and writes them to `folder`."""
    config = compose([])
    model = config.model
    size = write_tokenizer(folder / "tokenizer", model.text_encoder.max_position_embeddings)
    if size != model.text_encoder.vocab_size:
        raise ValueError(
            f"model.text_encoder.vocab_size={model.text_encoder.vocab_size}: the tokenizer of"
            f" data=shapes has {size} entries; set that in conf/model/tiny.yaml."
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    text_encoder = train_text_encoder(
        model.text_encoder, tokenizer, num_steps=text_encoder_steps, seed=seed, say=say
    )
    vae = train_vae(model.vae, model.resolution, num_steps=vae_steps, seed=seed, say=say)
    error = reconstruction_error(model.vae, vae, model.resolution)
    say(f"vae: held-out pictures come back within {error:.2f} of 255 grey levels on average")
    _write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    _write_weights(folder / "text_encoder" / "model.safetensors", text_encoder)
    write_configs(folder, config)


def write_configs(folder: Path, config: Config) -> None:
    """The JSON files beside the weights, with diffusers' and transformers' names."""
    files = {
        "model_index.json": _model_index(),
        "unet/config.json": _unet_config(config),
        "vae/config.json": _vae_config(config),
        "text_encoder/config.json": _text_encoder_config(config),
        "scheduler/scheduler_config.json": _scheduler_config(config),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdx.assets.make_tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--text-encoder-steps", type=int, default=TEXT_ENCODER_STEPS)
    options = parser.parse_args(argv)
    make_tiny(
        options.out,
        seed=options.seed,
        vae_steps=options.vae_steps,
        text_encoder_steps=options.text_encoder_steps,
        say=lambda line: print(line, flush=True),
    )
    return 0


def _write_weights(path: Path, params: Params) -> None:
    """Half precision: the weights are small numbers, and the package stays small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        to_torch(names): np.ascontiguousarray(array_to_torch(names, np.asarray(value)), np.float16)
        for names, value in flat(params).items()
    }
    path.write_bytes(save(arrays, metadata={"format": "pt"}))


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet_config(config: Config) -> dict[str, Any]:
    unet = config.model.unet
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": unet.sample_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": unet.block_out_channels,
        "layers_per_block": unet.layers_per_block,
        "down_block_types": [kind.name for kind in unet.down_block_types],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [UP_BLOCKS[kind] for kind in reversed(unet.down_block_types)],
        "attention_head_dim": unet.attention_head_dim,
        "cross_attention_dim": unet.cross_attention_dim,
        "use_linear_projection": unet.use_linear_projection,
        "upcast_attention": unet.upcast_attention,
        "norm_num_groups": unet.norm_num_groups,
        "norm_eps": unet.norm_eps,
        "act_fn": "silu",
        "flip_sin_to_cos": unet.flip_sin_to_cos,
        "freq_shift": unet.freq_shift,
    }


def _vae_config(config: Config) -> dict[str, Any]:
    vae, levels = config.model.vae, len(config.model.vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": config.model.resolution,
        "in_channels": vae.in_channels,
        "out_channels": vae.out_channels,
        "latent_channels": vae.latent_channels,
        "block_out_channels": vae.block_out_channels,
        "layers_per_block": vae.layers_per_block,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": vae.norm_num_groups,
        "act_fn": "silu",
        "scaling_factor": vae.scaling_factor,
        "force_upcast": False,
    }


def _text_encoder_config(config: Config) -> dict[str, Any]:
    text = config.model.text_encoder
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_act": text.hidden_act.name,
        "layer_norm_eps": text.layer_norm_eps,
        "projection_dim": text.hidden_size,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1,
    }


def _scheduler_config(config: Config) -> dict[str, Any]:
    diffusion = config.diffusion
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": diffusion.num_train_timesteps,
        "beta_schedule": diffusion.beta_schedule.name,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "prediction_type": config.model.prediction_type.name,
        "timestep_spacing": diffusion.timestep_spacing.name,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }


if __name__ == "__main__":
    sys.exit(main())
