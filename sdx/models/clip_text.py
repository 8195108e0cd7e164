"""The CLIP text encoder (transformers `CLIPTextModel`), up to and with the final LayerNorm, and the
layers it shares with the image encoder (clip_vision.py).

SD 2.x files hold the layers up to the one before the last, so "the penultimate layer" needs
nothing here.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdx.config.schema import HiddenAct, TextEncoderConfig
from sdx.models.attention import dot_product_attention, split_heads
from sdx.models.layers import Embedding, LayerNorm, Linear, Numerics


@runtime_checkable
class LayerConfig(Protocol):
    """What the layers of either encoder are built from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: HiddenAct
    layer_norm_eps: float


class CLIPTextModel(nnx.Module):
    """Token ids to the states that condition the UNet."""

    def __init__(
        self,
        config: TextEncoderConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        precision: jax.lax.Precision,
        rngs: nnx.Rngs,
        marks_padding: bool = False,
    ):
        numerics = Numerics(dtype, param_dtype, precision)
        self.marks_padding = marks_padding
        self.embeddings = Embeddings(config, numerics=numerics, rngs=rngs)
        self.encoder = Encoder(config, is_causal=True, numerics=numerics, rngs=rngs)
        self.final_layer_norm = LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps, numerics=numerics
        )

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """`context`: a state for each token, after the final LayerNorm; padding is not masked.

        With `marks_padding` the states past the first end-of-text, which has the highest id as in
        CLIP's pooling, are zeros: no state that was normalised is.
        """
        states = self.final_layer_norm(self.encoder(self.embeddings(tokens)))
        if not self.marks_padding:
            return states
        ends = jnp.argmax(tokens, axis=1)
        is_text = jnp.arange(tokens.shape[1])[None] <= ends[:, None]
        return jnp.where(is_text[..., None], states, 0)


class Embeddings(nnx.Module):
    """Vectors of tokens plus vectors of places."""

    def __init__(self, config: TextEncoderConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, **common)
        self.position_embedding = Embedding(
            config.max_position_embeddings, config.hidden_size, **common
        )

    def __call__(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        places = self.position_embedding(jnp.arange(tokens.shape[1]))
        return self.token_embedding(tokens) + places[None]


class Encoder(nnx.Module):
    """The stack of transformer layers."""

    def __init__(self, config: LayerConfig, *, is_causal: bool, numerics: Numerics, rngs: nnx.Rngs):
        self.layers = nnx.List(
            EncoderLayer(config, is_causal=is_causal, numerics=numerics, rngs=rngs)
            for _ in range(config.num_hidden_layers)
        )

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        for layer in self.layers:
            x = layer(x)
        return x


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: LayerConfig, *, is_causal: bool, numerics: Numerics, rngs: nnx.Rngs):
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, numerics=numerics)

        self.layer_norm1 = norm()
        self.self_attn = SelfAttention(config, is_causal=is_causal, numerics=numerics, rngs=rngs)
        self.layer_norm2 = norm()
        self.mlp = FeedForward(config, numerics=numerics, rngs=rngs)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nnx.Module):
    """Each token attends to all, or with `is_causal` to itself and those before it."""

    def __init__(self, config: LayerConfig, *, is_causal: bool, numerics: Numerics, rngs: nnx.Rngs):
        def projection() -> Linear:
            return Linear(config.hidden_size, config.hidden_size, numerics=numerics, rngs=rngs)

        self.q_proj = projection()
        self.k_proj = projection()
        self.v_proj = projection()
        self.out_proj = projection()
        self.num_heads = config.num_attention_heads
        self.is_causal = is_causal
        self.precision = numerics.precision

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        query, key, value = (
            split_heads(y, self.num_heads) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        y = dot_product_attention(
            query, key, value, upcast=False, precision=self.precision, is_causal=self.is_causal
        )
        return self.out_proj(y.reshape(x.shape))


class FeedForward(nnx.Module):
    """Two products around the activation the config names."""

    def __init__(self, config: LayerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **common)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **common)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        return self.fc2(self.activation(self.fc1(x)))


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x times the normal distribution function of x, by erf (SD 2.x)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """OpenAI's approximation x * sigmoid(1.702 x) (SD 1.x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {HiddenAct.gelu: exact_gelu, HiddenAct.quick_gelu: quick_gelu}
