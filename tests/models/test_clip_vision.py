"""CLIP's embeddings against transformers' CLIPModel."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdx.data.tokenizer import load_tokenizer
from sdx.models.clip_vision import CLIPModel
from sdx.models.layers import Numerics
from sdx.models.module import pure
from sdx.weights.clip import load_clip, read_clip_config
from sdx.weights.errors import WeightsError
from tests.clip_folder import IMAGE_SIZE, make_clip

NUMERICS = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.HIGHEST)
TEXTS = ["a red circle", "", "a big blue square on a white background and more words than fit here"]


@pytest.mark.parametrize("eos_token_id", [583, 2])
def test_embeddings_are_transformers(tmp_path: Path, eos_token_id: int) -> None:
    """With the end token's id, and with the one that old configs name."""
    theirs = make_clip(tmp_path, eos_token_id=eos_token_id)
    config = read_clip_config(tmp_path)
    network = pure(lambda rngs: CLIPModel(config, numerics=NUMERICS, rngs=rngs))
    params = load_clip(tmp_path, network.abstract())
    pixels = np.random.default_rng(0).normal(size=(3, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    tokens = load_tokenizer(tmp_path, max_length=16, num_embeddings=584).encode(TEXTS)
    with torch.no_grad():
        nchw = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        output = theirs(input_ids=torch.from_numpy(tokens).long(), pixel_values=nchw)
    for method, inputs, wanted in (
        ("encode_images", pixels, output.image_embeds),
        ("encode_texts", tokens, output.text_embeds),
    ):
        found = np.asarray(network.apply(params, jnp.asarray(inputs), method=method))
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
        assert np.abs(found[0] - found[1]).max() > 0.01  # else anything would agree


@pytest.mark.fast
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no config.json in it"),
        ({"model_type": "siglip"}, "model_type='siglip', must be 'clip'"),
        ({"model_type": "clip", "text_config": {"hidden_act": "relu"}}, "hidden_act='relu'"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, Any] | None, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=said):
        read_clip_config(tmp_path)


@pytest.mark.fast
def test_a_config_without_sizes_is_openais_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    config = read_clip_config(tmp_path)
    assert (config.text.hidden_size, config.vision.patch_size) == (512, 32)
    assert (config.projection_dim, config.eos_token_id) == (512, 49407)
