"""CLIP's image encoder, and the whole CLIP (transformers `CLIPModel`) that scores image and text.

Radford et al. 2021 (arXiv 2103.00020). The text half is clip_text.py's, with all of its layers.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sdx.config.schema import HiddenAct, TextEncoderConfig
from sdx.models.clip_text import CLIPTextModel, Encoder
from sdx.models.layers import Conv2d, Embedding, Initial, LayerNorm, Linear, Numerics

NO_PADDING = ((0, 0), (0, 0))
LEGACY_EOS_TOKEN_ID = 2
"""What configs said before transformers PR 24773: the end of a text is then its largest id."""


@dataclass
class CLIPVisionConfig:
    """Fields of the `vision_config` in CLIPModel's config.json, with its names and defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: HiddenAct = HiddenAct.quick_gelu
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPConfig:
    """What a CLIPModel's config.json says."""

    text: TextEncoderConfig
    vision: CLIPVisionConfig
    projection_dim: int
    eos_token_id: int


class CLIPModel(nnx.Module):
    """Images and texts to vectors of length 1 in one space."""

    def __init__(self, config: CLIPConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}
        self.text_model = CLIPTextModel(
            config.text,
            dtype=numerics.dtype,
            param_dtype=numerics.param_dtype,
            precision=numerics.precision,
            rngs=rngs,
        )
        self.vision_model = CLIPVisionModel(config.vision, **common)
        self.text_projection = Linear(
            config.text.hidden_size, config.projection_dim, use_bias=False, **common
        )
        self.visual_projection = Linear(
            config.vision.hidden_size, config.projection_dim, use_bias=False, **common
        )
        self.eos_token_id = config.eos_token_id

    def encode_images(self, images: Float[Array, "b H W c"]) -> Float[Array, "b p"]:
        """Unit vectors of images that scores/clip_score.py has prepared."""
        return _unit(self.visual_projection(self.vision_model(images)))

    def encode_texts(self, tokens: Int[Array, "b s"]) -> Float[Array, "b p"]:
        """Unit vectors of texts: the state at their first end token, projected."""
        if self.eos_token_id == LEGACY_EOS_TOKEN_ID:
            ends = jnp.argmax(tokens, axis=-1)
        else:
            ends = jnp.argmax(tokens == self.eos_token_id, axis=-1)
        states = self.text_model(tokens)
        last = jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0]
        return _unit(self.text_projection(last))


class CLIPVisionModel(nnx.Module):
    """Images to the normalised state of the class token."""

    def __init__(self, config: CLIPVisionConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, numerics=numerics)

        self.embeddings = Embeddings(config, numerics=numerics, rngs=rngs)
        self.pre_layrnorm = norm()  # sic, in transformers and in every file
        self.encoder = Encoder(config, is_causal=False, numerics=numerics, rngs=rngs)
        self.post_layernorm = norm()

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b d"]:
        states = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(states[:, 0])


class Embeddings(nnx.Module):
    """A class token and a vector for each square patch, plus vectors of places."""

    def __init__(self, config: CLIPVisionConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        patch, width = config.patch_size, config.hidden_size
        self.class_embedding = nnx.Param(
            jnp.zeros((width,), numerics.param_dtype), initial=Initial("normal", 0.02)
        )
        self.patch_embedding = Conv2d(
            config.num_channels,
            width,
            patch,
            stride=patch,
            padding=NO_PADDING,
            use_bias=False,
            numerics=numerics,
            rngs=rngs,
        )
        num_places = (config.image_size // patch) ** 2 + 1
        self.position_embedding = Embedding(num_places, width, numerics=numerics, rngs=rngs)

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b s d"]:
        patches = self.patch_embedding(images)
        b, h, w, d = patches.shape
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (b, 1, d))
        states = jnp.concatenate([first, patches.reshape(b, h * w, d)], axis=1)
        return states + self.position_embedding(jnp.arange(h * w + 1))[None]


def _unit(vectors: Float[Array, "b p"]) -> Float[Array, "b p"]:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
