"""Original names against diffusers' own converters, at the true shapes of 1.5 and 2.1."""

import warnings
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdx.config.compose import compose
from sdx.models.attention import dot_product_attention
from sdx.models.module import Params, flat
from sdx.models.networks import Networks, make_networks
from sdx.weights.names import array_to_torch, to_torch
from sdx.weights.original_names import Place, component_of, places
from tests.weights.original_layout import (
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
)

with warnings.catch_warnings(action="ignore"):
    converters: Any = import_module("diffusers.loaders.single_file_utils")

NUM_UNET_ARRAYS = 686  # of 1.5 and 2.1 alike
# Names in the published v1-5-pruned and v2-1_768-ema-pruned files, and what they are today.
PUBLISHED = {
    "model.diffusion_model.input_blocks.9.0.op.bias": "down_blocks.2.downsamplers.0.conv.bias",
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (
        "down_blocks.1.resnets.0.conv_shortcut.weight"
    ),
    "model.diffusion_model.input_blocks.11.0.emb_layers.1.bias": (
        "down_blocks.3.resnets.1.time_emb_proj.bias"
    ),
    "model.diffusion_model.middle_block.2.out_layers.3.bias": "mid_block.resnets.1.conv2.bias",
    "model.diffusion_model.output_blocks.2.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
    "model.diffusion_model.output_blocks.3.1.norm.bias": "up_blocks.1.attentions.0.norm.bias",
    "model.diffusion_model.output_blocks.8.2.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
    "model.diffusion_model.out.2.bias": "conv_out.bias",
    "first_stage_model.decoder.up.3.upsample.conv.bias": (
        "decoder.up_blocks.0.upsamplers.0.conv.bias"
    ),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"
    ),
    "first_stage_model.encoder.mid.attn_1.proj_out.bias": (
        "encoder.mid_block.attentions.0.to_out.0.bias"
    ),
}


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def networks(request: pytest.FixtureRequest) -> Networks:
    model = compose([f"model={request.param}"]).model
    return make_networks(model, attention=dot_product_attention, dtype="float32")


def torch_tensors(params: Params) -> dict[str, Any]:
    """Tensors without memory under diffusers' names, in torch's layout."""
    shapes = {
        to_torch(path): array_to_torch(path, np.broadcast_to(np.empty(()), leaf.shape)).shape
        for path, leaf in flat(params).items()
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_every_unet_array_is_reached(networks: Networks) -> None:
    today = torch_tensors(networks.unet.abstract())
    there = original_unet(today)
    found = places("unet", there)
    assert len(found) == len(today) == NUM_UNET_ARRAYS
    theirs = converters.convert_ldm_unet_checkpoint(there, {"layers_per_block": 2})
    assert {name: there[place.name] for name, place in found.items()} == theirs == today


def test_every_vae_array_is_reached(networks: Networks) -> None:
    today = torch_tensors(networks.vae.abstract())
    there = original_vae(today)
    found = places("vae", there)
    levels = dict.fromkeys(("down_block_types", "up_block_types"), range(4))
    theirs = converters.convert_ldm_vae_checkpoint(there, levels)
    assert found.keys() == theirs.keys() == today.keys()
    for name, place in found.items():
        shape, original = today[name].shape, there[place.name].shape
        assert theirs[name].shape == shape == original[: len(shape)], name
        assert place.is_linear == (len(original) > len(shape)), name


@pytest.mark.parametrize("start", ["cond_stage_model", "conditioner.embedders.0"])
def test_every_text_array_is_reached(networks: Networks, start: str) -> None:
    today = torch_tensors(networks.text_encoder.abstract())
    clip = original_clip(today, start)
    clip[f"{start}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)
    assert places("text_encoder", clip) == {
        name: Place(f"{start}.transformer.text_model.{name}") for name in today
    }
    open_clip = original_open_clip(today, torch.cat, start)
    found = places("text_encoder", open_clip)
    model = SimpleNamespace(
        config=SimpleNamespace(hidden_size=today["final_layer_norm.bias"].shape[0])
    )
    theirs = converters.convert_open_clip_checkpoint(model, open_clip, f"{start}.model.")
    assert {f"text_model.{name}" for name in found} == theirs.keys()
    assert found.keys() == today.keys()
    for name, place in found.items():
        whole, part = open_clip[place.name].shape, today[name].shape
        assert whole == part if place.third is None else whole[0] == 3 * part[0], name


def test_published_names(networks: Networks) -> None:
    there = original_unet(torch_tensors(networks.unet.abstract()))
    there |= original_vae(torch_tensors(networks.vae.abstract()))
    found = {**places("unet", there), **places("vae", there)}
    assert {found[today].name: today for today in PUBLISHED.values()} == PUBLISHED


def test_the_layer_after_the_states_is_left_out() -> None:
    start = "cond_stage_model.model."
    stems = [f"transformer.resblocks.{layer}.ln_1.bias" for layer in (2, 22, 23)]
    names = [start + name for name in (*stems, "text_projection", "logit_scale", "attn_mask")]
    assert [name for name in names if component_of(name)] == [start + stem for stem in stems[:2]]


def test_what_no_table_knows_is_kept_to_be_told() -> None:
    names = ["model.diffusion_model.label_emb.0.0.weight", "model_ema.decay", "betas"]
    assert places("unet", names) == {"label_emb.0.0.weight": Place(names[0])}
    assert places("vae", ["first_stage_model.loss.logvar"]) == {}
