"""Small Stable Diffusion folders that diffusers and transformers write, with the torch models."""

import json
import warnings
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from sdx.config.schema import MatmulPrecision, ModelConfig
from sdx.models.attention import dot_product_attention
from sdx.models.networks import Networks, make_networks
from sdx.weights.configs import read_model
from sdx.weights.model_files import ModelFiles, open_model

# One of each: 2.x has linear projections, heads by level, upcast logits and the exact GELU.
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"use_linear_projection": False},
    "sd2": {"use_linear_projection": True, "upcast_attention": True},
}
# By number of levels. Four is what the published models have, of both UNet and autoencoder.
CHANNELS = {2: (16, 32), 4: (20, 40, 80, 80)}
VAE_CHANNELS = {2: (8, 16), 4: (8, 12, 16, 16)}
LAYERS = {("sd1", 2): 2, ("sd2", 2): 1, ("sd1", 4): 1, ("sd2", 4): 1}
# One count for all levels (heads grow wider, as 1.x's do), or one width (more heads, as 2.x's).
HEADS: dict[tuple[str, int], int | list[int]] = {
    ("sd1", 2): 2,
    ("sd2", 2): [2, 4],
    ("sd1", 4): 4,
    ("sd2", 4): [2, 4, 8, 8],
}
ACTIVATIONS = {"sd1": "quick_gelu", "sd2": "gelu"}
PREDICTION_TYPES = {"sd1": "epsilon", "sd2": "v_prediction"}
PADDING = {"sd1": "<|endoftext|>", "sd2": "!"}
NUM_TOKENS = 77
STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False,
    "clip_sample": False,
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A folder that torch wrote, the torch models it was written from, and ours for its configs."""

    kind: str
    folder: Path
    unet: Any
    vae: Any
    text_encoder: Any

    @property
    def files(self) -> ModelFiles:
        return open_model(str(self.folder))

    @property
    def model(self) -> ModelConfig:
        return replace(
            read_model(self.files),
            name=self.kind,
            matmul_precision=MatmulPrecision.highest,
        )

    @property
    def networks(self) -> Networks:
        return make_networks(self.model, attention=dot_product_attention, dtype="float32")


@pytest.fixture(scope="session", params=list(UNETS))
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Both kinds in turn."""
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The 2.x kind alone, for what does not depend on the kind; never written to."""
    return make_reference("sd2", tmp_path_factory.mktemp("sd2"))


def make_reference(kind: str, folder: Path, levels: int = 2, vocab_size: int = 99) -> Reference:
    with warnings.catch_warnings(action="ignore"):  # the libraries' own, at import and on saving
        diffusers: Any = import_module("diffusers")  # its stubs hide the classes it exports
        transformers: Any = import_module("transformers")
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=CHANNELS[levels],
            layers_per_block=LAYERS[kind, levels],
            attention_head_dim=HEADS[kind, levels],
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            cross_attention_dim=24,
            norm_num_groups=4,
            **UNETS[kind],
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=VAE_CHANNELS[levels],
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=4,
        )
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                hidden_act=ACTIVATIONS[kind],
            )
        )
        scheduler = diffusers.DDIMScheduler(prediction_type=PREDICTION_TYPES[kind])
        for name, part in [("unet", unet), ("vae", vae), ("text_encoder", text_encoder)]:
            with torch.no_grad():  # fresh norms are ones and zeros, which hide a swapped pair
                for parameter in part.parameters():
                    if parameter.ndim == 1:
                        parameter += 0.1 * torch.randn_like(parameter)
            part.eval()
            part.save_pretrained(folder / name)
        scheduler.save_pretrained(folder / "scheduler")
    return Reference(kind, folder, unet, vae, text_encoder)


def complete(reference: Reference, **scheduler: Any) -> Path:
    """The reference's folder with Stable Diffusion's scheduler and a small tokenizer in it."""
    folder = reference.folder
    described = STABLE_DIFFUSION | {"prediction_type": PREDICTION_TYPES[reference.kind]} | scheduler
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": NUM_TOKENS}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"pad_token": PADDING[reference.kind]})
    )
    return folder
