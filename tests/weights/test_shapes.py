"""Shapes tell what the configs beside them say."""

import json
from typing import Any

import numpy as np
import pytest

from sdx.config.compose import compose
from sdx.config.leaves import plain
from sdx.models.attention import dot_product_attention
from sdx.models.module import flat
from sdx.models.networks import make_networks
from sdx.weights.names import array_to_torch, to_torch
from sdx.weights.shapes import told_by_shapes

NOT_TOLD = {
    "unet": {"attention_head_dim", "sample_size", "upcast_attention", "norm_num_groups"}
    | {"norm_eps", "flip_sin_to_cos", "freq_shift"},
    "vae": {"norm_num_groups", "scaling_factor"},
    "text_encoder": {"num_attention_heads", "hidden_act", "layer_norm_eps"},
}


def test_torchs_own_models(reference: Any) -> None:
    for part, module in vars(reference).items():
        if part in NOT_TOLD:
            shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            config = json.loads((reference.folder / part / "config.json").read_text())
            told = told_by_shapes(part, shapes)
            assert told == {key: config[key] for key in told}, part


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sd15", "sd21", "tiny"])
def test_all_keys_but_the_ones_without_shape(name: str) -> None:
    model = compose([f"model={name}"]).model
    networks = make_networks(model, attention=dot_product_attention, dtype="float32")
    for part, untold in NOT_TOLD.items():
        shapes = {
            to_torch(path): array_to_torch(path, np.broadcast_to(np.empty(()), leaf.shape)).shape
            for path, leaf in flat(getattr(networks, part).abstract()).items()
        }
        config = {key: plain(value) for key, value in vars(getattr(model, part)).items()}
        assert told_by_shapes(part, shapes) == {k: v for k, v in config.items() if k not in untold}


@pytest.mark.fast
def test_arrays_that_are_missing() -> None:
    assert told_by_shapes("text_encoder", {}) == {"num_hidden_layers": 0}
    assert told_by_shapes("vae", {"encoder.conv_in.weight": (8, 3, 3, 3)})["in_channels"] == 3
