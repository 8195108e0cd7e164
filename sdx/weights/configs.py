"""The JSON configs beside weights: read into our dataclasses, and compared with a run's config.

A key that a file leaves out has the value diffusers or transformers would give it (`ABSENT`), which
is not always the schema's default. A file that asks for mathematics we do not have is refused
(`ONLY`), because its weights might fit and still mean something else.
"""

import re
from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from operator import attrgetter
from pathlib import PurePath
from typing import Any

from sdx.config.schema import (
    DownBlock,
    HiddenAct,
    Init,
    ModelConfig,
    PredictionType,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS
from sdx.weights.model_files import ModelFiles, NetworkFiles
from sdx.weights.original import IN_CHANNELS

# Defaults of diffusers 0.42 (UNet2DConditionModel, AutoencoderKL), transformers 5 (CLIPTextConfig).
ABSENT: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 1280,
        "use_linear_projection": False,
        "upcast_attention": False,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
# Keys we have no switch for, with the values that mean what we compute.
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "_class_name": ("UNet2DConditionModel",),
        "act_fn": ("silu",),
        "addition_embed_type": (None,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_attention_heads": (None,),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1.0,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "time_cond_proj_dim": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
        "transformer_layers_per_block": (1,),
    },
    "vae": {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        "down_block_types": ("DownEncoderBlock2D",),
        "latents_mean": (None,),
        "latents_std": (None,),
        "mid_block_add_attention": (True,),
        "shift_factor": (None,),
        "up_block_types": ("UpDecoderBlock2D",),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    "text_encoder": {"model_type": ("clip_text_model",)},
}
# What keys that ask for another network probably mean: (regular expression on a fault, meaning).
MEANINGS = (
    (r"^addition_embed_type=text", "this is a UNet of Stable Diffusion XL"),
    (r"^(class_embed_type|num_class_embeds)=", "this is a UNet of an upscaler or of unCLIP"),
    (r"^time_cond_proj_dim=", "this is a latent consistency model; train the one it came from"),
    (r"^(shift_factor|use_quant_conv)=", "this is an autoencoder of Stable Diffusion 3 or Flux"),
    (r"^model_type=clip:", "this is the whole CLIP: save its text model alone"),
)
UP_BLOCKS = {
    "CrossAttnDownBlock2D": "CrossAttnUpBlock2D",
    "DownBlock2D": "UpBlock2D",
}
# The native size of a model is a recommendation, not mathematics: another one loads.
NOT_COMPARED = {"sample_size"}
# What the parts of one model must agree on.
EQUAL = (
    ("unet.in_channels", "vae.latent_channels"),
    ("unet.out_channels", "vae.latent_channels"),
    ("unet.cross_attention_dim", "text_encoder.hidden_size"),
)
# Keys with one value for each level; all others are one value for all.
BY_LEVEL: dict[str, set[str]] = {
    "unet": {"attention_head_dim", "block_out_channels", "down_block_types", "up_block_types"},
    "vae": {"block_out_channels"},
    "text_encoder": set(),
}


def read_model(files: ModelFiles) -> ModelConfig:
    """The model that the files describe: the architecture of each part, and the prediction type."""
    unet, vae, text_encoder = (READERS[component](files) for component in COMPONENTS)
    model = ModelConfig(
        name=PurePath(files.source).name,
        pretrained=files.source,
        init=Init.pretrained,
        resolution=unet.sample_size * vae.factor,
        prediction_type=read_prediction_type(files),
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
    )
    faults = [
        f"{one}={here} in {files.where(one.split('.')[0])}, {other}={there} in "
        f"{files.where(other.split('.')[0])}"
        for one, other in EQUAL
        if (here := attrgetter(one)(model)) != (there := attrgetter(other)(model))
    ]
    if faults:
        raise WeightsError(f"{files.source}: its parts do not belong together:", faults)
    return model


def read_unet_config(files: NetworkFiles) -> UNetConfig:
    """The UNet that unet/config.json describes."""
    found = _read(files, "unet")
    mirrored = [UP_BLOCKS.get(kind) for kind in reversed(found["down_block_types"])]
    if found.get("up_block_types", mirrored) != mirrored:
        raise WeightsError(
            f"{files.where('unet')}: up_block_types={found['up_block_types']} does not "
            f"mirror down_block_types={found['down_block_types']}, as sdx builds them."
        )
    heads = found["attention_head_dim"]
    if isinstance(heads, int):
        heads = [heads] * len(found["block_out_channels"])
    kinds = [DownBlock[kind] for kind in found["down_block_types"]]
    return _make(UNetConfig, found | {"attention_head_dim": heads, "down_block_types": kinds})


def read_vae_config(files: NetworkFiles) -> VAEConfig:
    """The autoencoder that vae/config.json describes."""
    return _make(VAEConfig, _read(files, "vae"))


def read_text_encoder_config(files: NetworkFiles) -> TextEncoderConfig:
    """The text encoder that text_encoder/config.json describes."""
    found = _read(files, "text_encoder")
    if found["hidden_act"] not in HiddenAct.__members__:
        raise WeightsError(
            f"{files.where('text_encoder')}: hidden_act={found['hidden_act']} is not "
            f"one of {', '.join(HiddenAct.__members__)}."
        )
    return _make(TextEncoderConfig, found | {"hidden_act": HiddenAct[found["hidden_act"]]})


def read_prediction_type(files: NetworkFiles) -> PredictionType:
    """What the UNet was trained to output, by its scheduler's config."""
    name = (files.config("scheduler") or {}).get("prediction_type", "epsilon")
    if name not in list(PredictionType.__members__):
        raise WeightsError(
            f"{files.where('scheduler')}: prediction_type={name} is not one of "
            f"{', '.join(PredictionType.__members__)}."
        )
    return PredictionType[name]


READERS = {
    "unet": read_unet_config,
    "vae": read_vae_config,
    "text_encoder": read_text_encoder_config,
}
"""By the names of the components, which are those of the model's parts."""


def check_model(files: NetworkFiles, model: ModelConfig, components: Iterable[str]) -> None:
    """Raises a WeightsError with every key in which the files of `components` and `model` disagree.

    With the UNet goes what it was trained to output, where files say so.
    """
    faults = []
    for component in components:
        found, wanted = READERS[component](files), getattr(model, component)
        faults += _differences(component, found, wanted, files.where(component))
        if component == "unet" and files.config("scheduler") is not None:
            faults += _prediction_types(files, model)
    if faults:
        raise WeightsError(
            f"{files.source}: {len(faults)} keys differ between model={model.name} and its files; "
            "choose the model group that fits them, set these keys, or set model.from_files=true:",
            faults,
        )


def _prediction_types(files: NetworkFiles, model: ModelConfig) -> list[str]:
    trained, wanted = read_prediction_type(files), model.prediction_type
    if trained is wanted:
        return []
    where = _short(files.where("scheduler"))
    return [f"model.prediction_type is {wanted.name}, in {where} {trained.name}"]


def _read(files: NetworkFiles, component: str) -> dict[str, Any]:
    defaults = ABSENT[component]
    written = {
        key: value if key in BY_LEVEL[component] else _one(value)
        for key, value in (files.config(component) or {}).items()
    }
    if written.get("sample_size", 0) is None:
        del written["sample_size"]
    found = defaults | written
    faults = [
        f"{key}={found[key]!r}: must look like {default!r}"
        for key, default in defaults.items()
        if not _looks_like(found[key], default, key)
    ]
    faults += [
        f"{key}={found[key]}: sdx computes only {' or '.join(map(str, allowed))}"
        for key, allowed in ONLY[component].items()
        if key in found and found[key] not in allowed
    ]
    if component == "unet" and not faults:
        faults = _unet_faults(found)
    if faults:
        hints = [text for pattern, text in MEANINGS if any(re.search(pattern, f) for f in faults)]
        raise WeightsError(
            f"{files.where(component)}: {len(faults)} keys ask for another network:", faults, hints
        )
    return found


def _unet_faults(found: dict[str, Any]) -> list[str]:
    faults = [
        f"down_block_types has {kind}: sdx builds only {' and '.join(UP_BLOCKS)}"
        for kind in dict.fromkeys(found["down_block_types"])
        if kind not in UP_BLOCKS
    ]
    levels = len(found["block_out_channels"])
    faults += [
        f"{key}={found[key]}: must have {levels} entries, as block_out_channels"
        for key in ("down_block_types", "attention_head_dim")
        if isinstance(found[key], list) and len(found[key]) != levels
    ]
    if (what := IN_CHANNELS.get(found["in_channels"])) is not None:
        faults.append(f"in_channels={found['in_channels']}: {what}; sdx trains text to image")
    return faults


def _one(value: Any) -> Any:
    """The one value of a list that says the same for every level, as some converters write it."""
    is_same = isinstance(value, list) and value and value.count(value[0]) == len(value)
    return value[0] if is_same else value


def _looks_like(value: Any, default: Any, key: str = "") -> bool:
    if isinstance(default, list) or (key == "attention_head_dim" and isinstance(value, list)):
        item = default[0] if isinstance(default, list) else default
        return isinstance(value, list) and all(_looks_like(v, item) for v in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


def _make(kind: Any, found: dict[str, Any]) -> Any:
    return kind(**{field.name: found[field.name] for field in fields(kind)})


def _differences(component: str, found: Any, wanted: Any, where: str) -> list[str]:
    return [
        f"model.{component}.{field.name} is {_shown(ours)}, in {_short(where)} {_shown(theirs)}"
        for field in fields(found)
        if field.name not in NOT_COMPARED
        and (ours := getattr(wanted, field.name)) != (theirs := getattr(found, field.name))
    ]


def _short(where: str) -> str:
    """A config's path from its model's folder; of other files the name."""
    path = PurePath(where)
    return f"{path.parent.name}/{path.name}" if path.suffix == ".json" else path.name


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return value.name if isinstance(value, Enum) else str(value)
