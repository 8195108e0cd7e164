"""Text encoder, autoencoder and UNet of the published depth against torch, run live.

Two levels, as every other test has, would hide a fault that needs a third: an order of skips, a
number of heads, an enlargement whose size is not twice the last.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdx.models.module import Params, nested
from sdx.weights.load import load_text_encoder, load_unet, load_vae
from sdx.weights.names import array_from_torch, from_torch
from tests.parity.sides import nchw, nhwc, normal, quickly
from tests.weights.conftest import NUM_TOKENS, Reference, make_reference

ATOL = 1e-5  # the promise is 1e-4
VOCABULARY = 99


def run(function: Any, *args: Any) -> Any:
    args = tuple(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args)
    return np.asarray(quickly(function, *args)(*args))


def test_text_states(deep: Reference) -> None:
    """Of whole sentences: ends and padding are tokens like any other, and none is masked."""
    text = deep.networks.text_encoder
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, NUM_TOKENS), dtype=np.int32)
    tokens[0, 1:] = 0
    tokens[1, 5:] = VOCABULARY - 1
    ours = run(text.apply, load_text_encoder(deep.files, text.abstract()), tokens)
    with torch.no_grad():
        theirs = deep.text_encoder(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)


def test_images_to_moments_and_back(deep: Reference) -> None:
    """Sides that no level divides exactly: 44 and 60 pixels are 5 and 7 latents."""
    vae = deep.networks.vae
    params = load_vae(deep.files, vae.abstract())
    images, latents = normal(1, 2, 44, 60, 3), normal(2, 2, 5, 7, 4)
    encoded = run(lambda p, x: vae.apply(p, x, method="encode"), params, images)
    decoded = run(lambda p, x: vae.apply(p, x, method="decode"), params, latents)
    with torch.no_grad():
        moments = deep.vae.encode(nchw(images)).latent_dist.parameters
        pixels = deep.vae.decode(nchw(latents)).sample
    np.testing.assert_allclose(encoded, nhwc(moments), rtol=0, atol=ATOL)
    np.testing.assert_allclose(decoded, nhwc(pixels), rtol=0, atol=ATOL)


@pytest.mark.parametrize("size", [(8, 8), (9, 14)])
def test_predictions(deep: Reference, size: tuple[int, int]) -> None:
    unet = deep.networks.unet
    params = load_unet(deep.files, unet.abstract())
    sample, context = normal(3, 3, *size, 4), normal(4, 3, NUM_TOKENS, 24)
    timesteps = np.array([0, 500, 999], np.int32)
    ours = run(unet.apply, params, sample, timesteps, context)
    with torch.no_grad():
        theirs = deep.unet(
            nchw(sample), torch.from_numpy(timesteps).long(), torch.from_numpy(context)
        ).sample
    np.testing.assert_allclose(ours, nhwc(theirs), rtol=0, atol=ATOL)


def test_epsilons_of_norms(tmp_path: Path) -> None:
    """UNet and autoencoder differ in theirs, which only what varies little can show."""
    model = make_reference("sd2", tmp_path)
    networks = model.networks
    sample, context = normal(5, 1, 8, 8, 4), 0.01 * normal(6, 1, NUM_TOKENS, 24)
    images, tokens = 0.1 * normal(7, 1, 16, 16, 3), np.arange(NUM_TOKENS, dtype=np.int32)[None]
    with torch.no_grad():
        unet, vae, text = (dimmed(x) for x in (model.unet, model.vae, model.text_encoder))
        predicted = model.unet(nchw(sample), torch.tensor([7]), torch.from_numpy(context)).sample
        moments = model.vae.encode(nchw(images)).latent_dist.parameters
        pixels = model.vae.decode(nchw(sample)).sample
        states = model.text_encoder(torch.from_numpy(tokens).long()).last_hidden_state
    pairs = {
        "unet": (run(networks.unet.apply, unet, sample, np.array([7]), context), nhwc(predicted)),
        "encode": (run(partial(networks.vae.apply, method="encode"), vae, images), nhwc(moments)),
        "decode": (run(partial(networks.vae.apply, method="decode"), vae, sample), nhwc(pixels)),
        "text": (run(networks.text_encoder.apply, text, tokens), states.numpy()),
    }
    for name, (ours, theirs) in pairs.items():
        difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
        assert difference <= 1e-4 * largest, name


def dimmed(model: Any) -> Params:
    """Our parameters of `model`, once what leads to its norms is a hundredth of what it was: then
    variances are as small as epsilons."""
    for name, parameter in model.named_parameters():
        if "norm" not in name and "transformer_blocks" not in name:
            parameter *= 0.01
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return nested(
        {from_torch(name): jnp.asarray(array_from_torch(name, x)) for name, x in arrays.items()}
    )
