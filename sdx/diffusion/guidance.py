"""Classifier-free guidance, as a wrapper of the function that predicts.

Source: Ho & Salimans 2022, arXiv 2207.12598, in the form Stable Diffusion uses (scale 1 is no
guidance).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

SMALLEST = 1e-12  # a prediction without any deviation must not divide by zero

Predict = Callable[
    [Float[Array, "b h w c"], Real[Array, " b"], Float[Array, "b s d"]], Float[Array, "b h w c"]
]
"""A UNet with its weights: noisy latents, timesteps and text states in, its raw output out."""


def guided(
    predict: Predict,
    negative_context: Float[Array, "b s d"],
    scale: Float[Array, ""],
    rescale: Float[Array, ""],
) -> Predict:
    """`predict`, pushed away from what it says for `negative_context`; one call of twice the batch.

    guided = negative + scale * (positive - negative)

    `rescale` 0 to 1 brings the result's deviation back towards that of `positive` (Lin et al. 2023,
    arXiv 2305.08891, equations 15 and 16).
    """

    def predict_guided(
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, " b"],
        context: Float[Array, "b s d"],
    ) -> Float[Array, "b h w c"]:
        both = predict(
            jnp.concatenate([latents, latents]),
            jnp.concatenate([timesteps, timesteps]),
            jnp.concatenate([negative_context, context]),
        )
        negative, positive = jnp.split(both, 2)
        pushed = negative + scale * (positive - negative)
        shrunk = pushed * (_deviation(positive) / jnp.maximum(_deviation(pushed), SMALLEST))
        return rescale * shrunk + (1 - rescale) * pushed

    return predict_guided


def _deviation(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 1"]:
    return jnp.std(x, axis=(1, 2, 3), keepdims=True)
