"""The three networks of one model, as pure functions of their parameters."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sdx.config.schema import ModelConfig, Remat
from sdx.models.attention import AttentionFn
from sdx.models.clip_text import CLIPTextModel
from sdx.models.layers import PlaceFn
from sdx.models.module import Pure, pure
from sdx.models.unet import UNet2DConditionModel
from sdx.models.vae import AutoencoderKL


@dataclass(frozen=True)
class Networks:
    """UNet, image autoencoder and text encoder; their parameters live elsewhere."""

    unet: Pure
    vae: Pure
    text_encoder: Pure


def make_networks(
    model: ModelConfig,
    *,
    attention: AttentionFn,
    dtype: str,
    remat: Remat = Remat.none,
    trains_text_encoder: bool = False,
    mask_padding_tokens: bool = False,
    over_width: PlaceFn | None = None,
) -> Networks:
    """The networks that `model` describes, computing in `dtype`; frozen ones are stored in
    float32.

    With `mask_padding_tokens` the text encoder marks states past the end of the text, and the
    UNet's cross-attention passes over them. `over_width` says how the UNet's feed-forward layers
    lie over devices that share them.
    """
    precision = jax.lax.Precision[model.matmul_precision.name.upper()]
    common = {"dtype": jnp.dtype(dtype), "precision": precision}
    weights = jnp.dtype(model.weights_dtype.name)
    return Networks(
        unet=pure(
            lambda rngs: UNet2DConditionModel(
                model.unet,
                attention=attention,
                param_dtype=weights,
                remat=remat,
                skips_absent=mask_padding_tokens,
                over_width=over_width,
                rngs=rngs,
                **common,
            )
        ),
        vae=pure(
            lambda rngs: AutoencoderKL(
                model.vae, attention=attention, param_dtype=jnp.float32, rngs=rngs, **common
            )
        ),
        text_encoder=pure(
            lambda rngs: CLIPTextModel(
                model.text_encoder,
                param_dtype=weights if trains_text_encoder else jnp.float32,
                marks_padding=mask_padding_tokens,
                rngs=rngs,
                **common,
            )
        ),
    )
