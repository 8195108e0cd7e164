"""Tensors of diffusers' networks under the names of an original checkpoint: the way back.

Written apart from sdx's tables, the other way round; diffusers' own converters say whether it is
right (test_original_names.py).
"""

import re
from typing import Any

import torch

Tensors = dict[str, Any]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_model(kind: str, unet: Tensors, vae: Tensors, text_encoder: Tensors) -> Tensors:
    """A whole checkpoint of torch tensors, "sd1" or "sd2", with what such files have besides."""
    whole = original_unet(unet) | original_vae(vae)
    if kind == "sd1":
        whole |= original_clip(text_encoder)
        whole["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    else:
        width = len(text_encoder["final_layer_norm.bias"])
        whole |= original_open_clip(text_encoder, torch.cat)
        whole["cond_stage_model.model.logit_scale"] = torch.ones(())
        whole["cond_stage_model.model.text_projection"] = torch.zeros(width, width)
    buffers = {"betas": torch.zeros(9), "alphas_cumprod": torch.zeros(9)}
    return {name: tensor.contiguous() for name, tensor in (whole | buffers).items()}


def original_unet(tensors: Tensors) -> Tensors:
    """`model.diffusion_model.*` of a UNet's tensors."""
    layers = 1 + max(int(name.split(".")[3]) for name in tensors if "down_blocks.0.resnets" in name)
    with_attention = {name.split(".attentions")[0] for name in tensors if ".attentions." in name}
    found = {}
    for name, tensor in tensors.items():
        stem, *parts = name.split(".")
        if stem in ("down_blocks", "up_blocks"):
            level, kind, layer, *rest = parts
            first = int(level) * (layers + 1)
            module = {
                "down_blocks.resnets": f"input_blocks.{first + int(layer) + 1}.0",
                "down_blocks.attentions": f"input_blocks.{first + int(layer) + 1}.1",
                "down_blocks.downsamplers": f"input_blocks.{first + layers + 1}.0",
                "up_blocks.resnets": f"output_blocks.{first + int(layer)}.0",
                "up_blocks.attentions": f"output_blocks.{first + int(layer)}.1",
                "up_blocks.upsamplers": f"output_blocks.{first + layers}."
                + ("2" if f"{stem}.{level}" in with_attention else "1"),
            }[f"{stem}.{kind}"]
            rest = ["op", *rest[1:]] if kind == "downsamplers" else rest
            short = ".".join([module, *rest])
        else:
            short = _swap_start(name, UNET_ENDS)
        is_resnet = ".resnets." in name
        swapped = _swap(short, RESNET) if is_resnet else short
        found[f"model.diffusion_model.{swapped}"] = tensor
    return found


def original_vae(tensors: Tensors) -> Tensors:
    """`first_stage_model.*` of an autoencoder's tensors; its attention is of 1x1 convolutions."""
    last = max(int(name.split(".")[2]) for name in tensors if "decoder.up_blocks" in name)
    found = {}
    for name, tensor in tensors.items():
        if "mid_block.attentions" in name:
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            name = _swap(name.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
        name = re.sub(r"mid_block\.resnets\.0", "mid.block_1", name)
        name = re.sub(r"mid_block\.resnets\.1", "mid.block_2", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        up = re.search(r"up_blocks\.(\d)\.(resnets|upsamplers\.0)", name)
        if up:
            kind = "block" if up[2] == "resnets" else "upsample"
            name = name.replace(up[0], f"up.{last - int(up[1])}.{kind}")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[f"first_stage_model.{name}"] = tensor
    return found


def original_clip(tensors: Tensors, start: str = "cond_stage_model") -> Tensors:
    """The text encoder of 1.x: transformers' names of its day, under a prefix."""
    return {
        f"{start}.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in tensors.items()
    }


def original_open_clip(
    tensors: Tensors, concatenate: Any, start: str = "cond_stage_model"
) -> Tensors:
    """The text encoder of 2.x: open_clip's names; `concatenate` joins arrays by their rows."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    found = {}
    for name, tensor in tensors.items():
        if "self_attn.q_proj." in name:
            rows = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            tensor = concatenate(rows)
        elif "self_attn.k_proj." in name or "self_attn.v_proj." in name:
            continue
        for today, there in {
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.token_embedding": "token_embedding",
            "final_layer_norm": "ln_final",
            "encoder.layers": "transformer.resblocks",
            "self_attn.out_proj": "attn.out_proj",
            "layer_norm": "ln_",
            "fc1": "c_fc",
            "fc2": "c_proj",
        }.items():
            name = name.replace(today, there)
        found[f"{start}.model.{name}"] = tensor
    return found


def _swap(name: str, table: dict[str, str]) -> str:
    """`name` with the module just before its leaf respelt."""
    for today, there in table.items():
        name = re.sub(rf"\.{re.escape(today)}\.(weight|bias)$", rf".{there}.\1", name)
    return name


def _swap_start(name: str, table: dict[str, str]) -> str:
    today = next(start for start in table if name.startswith(f"{start}."))
    return table[today] + name.removeprefix(today)
