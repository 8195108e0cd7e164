"""Loaded weights compute what torch computes: states, moments, images, predictions, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

from sdx.models.module import flat
from sdx.weights.load import load_text_encoder, load_unet, load_vae
from sdx.weights.names import array_to_torch, to_torch

FORWARD_ATOL = 1e-5
GRADIENT_RTOL = 1e-4  # of each parameter's gradient, in the L2 norm


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


def assert_close(ours: jax.Array, theirs: torch.Tensor) -> None:
    if ours.ndim == 4:
        theirs = theirs.permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=FORWARD_ATOL)


def test_text_states(reference: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, 99, (2, 77), dtype=np.int32)
    text = reference.networks.text_encoder
    params = load_text_encoder(reference.files, text.abstract())
    ours = jax.jit(text.apply)(params, jnp.asarray(tokens))
    assert_close(ours, reference.text_encoder(torch.from_numpy(tokens).long()).last_hidden_state)


def test_images_to_moments_and_back(reference: Any) -> None:
    vae = reference.networks.vae
    params = load_vae(reference.files, vae.abstract())
    images, latents = normal(1, 2, 12, 20, 3), normal(2, 2, 6, 10, 4)
    encode = jax.jit(lambda params, x: vae.apply(params, x, method="encode"))
    decode = jax.jit(lambda params, x: vae.apply(params, x, method="decode"))

    moments = reference.vae.encode(nchw(images)).latent_dist.parameters
    assert_close(encode(params, jnp.asarray(images)), moments)
    assert_close(decode(params, jnp.asarray(latents)), reference.vae.decode(nchw(latents)).sample)


def test_predictions_on_sides_no_level_divides(reference: Any) -> None:
    unet = reference.networks.unet
    params = load_unet(reference.files, unet.abstract())
    sample, context = normal(3, 1, 7, 10, 4), normal(4, 1, 77, 24)
    ours = jax.jit(unet.apply)(params, *map(jnp.asarray, (sample, np.array([999]), context)))
    timesteps = torch.tensor([999])
    assert_close(ours, reference.unet(nchw(sample), timesteps, torch.from_numpy(context)).sample)


def test_predictions_and_every_gradient(reference: Any) -> None:
    unet = reference.networks.unet
    params = load_unet(reference.files, unet.abstract())
    sample, target, context = normal(5, 2, 8, 8, 4), normal(6, 2, 8, 8, 4), normal(7, 2, 77, 24)
    timesteps = np.array([3, 901])

    def loss(params: Any, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        prediction = unet.apply(params, *inputs)
        return jnp.mean(jnp.square(prediction - target)), prediction

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (ours, prediction), gradients = step(params, *map(jnp.asarray, (sample, timesteps, context)))

    reference.unet.zero_grad()
    expected = reference.unet(
        nchw(sample), torch.from_numpy(timesteps), torch.from_numpy(context)
    ).sample
    theirs = torch.nn.functional.mse_loss(expected, nchw(target))
    theirs.backward()

    assert_close(prediction, expected)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
    parameters = dict(reference.unet.named_parameters())
    assert len(parameters) == len(flat(gradients))
    for path, gradient in flat(gradients).items():
        theirs = parameters[to_torch(path)].grad.numpy()
        distance = np.linalg.norm(array_to_torch(path, np.asarray(gradient)) - theirs)
        assert distance <= GRADIENT_RTOL * np.linalg.norm(theirs), "/".join(path)
