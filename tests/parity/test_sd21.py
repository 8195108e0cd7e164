"""Stable Diffusion 2.1 at its true size against torch: 1.29 billion random parameters.

The torch models are made first, one after the other, and leave a folder and their answers; then
sdx, configured by `model=sd21`, finds that the folder is that model, loads it and computes the
same. Takes minutes, 6 GB of disk and up to 20 GB of memory.
"""

import gc
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdx.models.attention_choice import select_attention
from sdx.models.module import flat
from sdx.models.networks import Networks, make_networks
from sdx.weights.configs import check_model
from sdx.weights.folder import COMPONENTS
from sdx.weights.load import load_text_encoder, load_unet, load_vae
from sdx.weights.model_files import ModelFiles, open_model
from tests.config.quick import quick
from tests.parity.sides import nchw, nhwc, normal

pytestmark = pytest.mark.release

ATOL = 1e-4
MEMORY_BYTES = 20e9
NUM_PARAMETERS = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
# What the repository's config.json files say where diffusers and transformers default otherwise.
UNET = {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
TEXT_ENCODER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SAMPLE, CONTEXT, TIMESTEP = normal(0, 1, 32, 32, 4), normal(1, 1, 77, 1024), 501
TOKENS = np.random.default_rng(2).integers(0, 49408, (1, 77), dtype=np.int32)
IMAGES = np.tanh(normal(3, 1, 256, 256, 3))
Answers = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def answers_and_folder() -> Iterator[tuple[Answers, Path]]:
    """What torch says of each input, and the models it said it with."""
    answers: Answers = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        folder = Path(name)
        diffusers: Any = import_module("diffusers")
        transformers: Any = import_module("transformers")
        diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(
            folder / "scheduler"
        )
        torch.manual_seed(0)
        with torch.no_grad():
            unet = _saved(diffusers.UNet2DConditionModel(**UNET), "unet", folder)
            inputs = nchw(SAMPLE), torch.tensor([TIMESTEP]), torch.from_numpy(CONTEXT)
            answers["unet"] = nhwc(unet(*inputs).sample)
            del unet
            vae = _saved(diffusers.AutoencoderKL(**VAE), "vae", folder)
            answers["encode"] = nhwc(vae.encode(nchw(IMAGES)).latent_dist.parameters)
            answers["decode"] = nhwc(vae.decode(nchw(SAMPLE)).sample)
            del vae
            config = transformers.CLIPTextConfig(**TEXT_ENCODER)
            text = _saved(transformers.CLIPTextModel(config), "text_encoder", folder)
            states = text(torch.from_numpy(TOKENS).long()).last_hidden_state
            answers["text_encoder"] = states.numpy()
            del text
        yield answers, folder


def _saved(model: Any, component: str, folder: Path) -> Any:
    for parameter in model.parameters():
        if parameter.ndim == 1:  # fresh norms are ones and zeros, which hide a swapped pair
            parameter += 0.1 * torch.randn_like(parameter)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[component]
    model.eval().save_pretrained(folder / component)
    return model


def test_true_sizes(answers_and_folder: tuple[Answers, Path]) -> None:
    answers, folder = answers_and_folder
    config = quick(["model=sd21"])
    files = open_model(str(folder))
    check_model(files, config.model, COMPONENTS)
    attention = select_attention(config.attention, config.hardware.platform, dtype="float32")
    networks = make_networks(config.model, attention=attention, dtype="float32")
    for component, compute in (("unet", _unet), ("vae", _vae), ("text_encoder", _text_encoder)):
        for name, ours in compute(files, networks).items():
            difference = np.abs(ours - answers[name]).max()
            largest = np.abs(answers[name]).max()
            print(f"{component} {name}: max |difference| {difference:.1e}, largest {largest:.2f}")
            assert difference <= ATOL, name
        gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of the process: {peak / 1e9:.1f} GB")
    assert peak <= MEMORY_BYTES


def _unet(files: ModelFiles, networks: Networks) -> Answers:
    params = load_unet(files, networks.unet.abstract())
    assert len(flat(params)) == 686
    return {"unet": _run(networks.unet.apply, params, SAMPLE, np.array([TIMESTEP]), CONTEXT)}


def _vae(files: ModelFiles, networks: Networks) -> Answers:
    vae = networks.vae
    params = load_vae(files, vae.abstract())
    return {
        "encode": _run(lambda p, x: vae.apply(p, x, method="encode"), params, IMAGES),
        "decode": _run(lambda p, x: vae.apply(p, x, method="decode"), params, SAMPLE),
    }


def _text_encoder(files: ModelFiles, networks: Networks) -> Answers:
    params = load_text_encoder(files, networks.text_encoder.abstract())
    return {"text_encoder": _run(networks.text_encoder.apply, params, TOKENS)}


def _run(function: Callable[..., Any], params: Any, *inputs: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(jax.jit(function)(params, *map(jnp.asarray, inputs)))
