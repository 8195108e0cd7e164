"""Classifier-free guidance, as a wrapper of the function that predicts.

Source: Ho & Salimans 2022, arXiv 2207.12598, in the form Stable Diffusion uses (scale 1 is no
guidance).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Predict = Callable[
    [Float[Array, "b h w c"], Int[Array, " b"], Float[Array, "b s d"]], Float[Array, "b h w c"]
]
"""A UNet with its weights: noisy latents, timesteps and text states in, its raw output out."""


def guided(
    predict: Predict, negative_context: Float[Array, "b s d"], scale: Float[Array, ""]
) -> Predict:
    """`predict`, pushed away from what it says for `negative_context`; one call on the doubled
    batch.

    guided = negative + scale * (positive - negative)
    """

    def predict_guided(
        latents: Float[Array, "b h w c"],
        timesteps: Int[Array, " b"],
        context: Float[Array, "b s d"],
    ) -> Float[Array, "b h w c"]:
        both = predict(
            jnp.concatenate([latents, latents]),
            jnp.concatenate([timesteps, timesteps]),
            jnp.concatenate([negative_context, context]),
        )
        negative, positive = jnp.split(both, 2)
        return negative + scale * (positive - negative)

    return predict_guided
