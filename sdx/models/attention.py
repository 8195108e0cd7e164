"""Attention, and the transformer blocks of the UNet around it.

The function that computes attention is handed in (`AttentionFn`), so that a kernel can be swapped
without touching a network; `dot_product_attention` is the plain one, the reference for all others.
attention_choice.py picks, attention_kernels.py holds those of accelerators, attention_mesh.py parts
the work among devices.
"""

import math
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sdx.models.layers import Conv2d, GroupNorm, LayerNorm, Linear, Numerics, contract

# diffusers fixes this one in Transformer2DModel; the config's `norm_eps` is for ResNet blocks.
TRANSFORMER_NORM_EPS = 1e-6
FEED_FORWARD_FACTOR = 4
# Per-head attention: from how many weights on a head is computed alone, and how many such copies
# of its operations a program may hold.
LONG = 2**18
MAX_UNROLLED = 16


@runtime_checkable  # beartype checks arguments against it in tests
class AttentionFn(Protocol):
    """softmax(query key^T / sqrt(d)) value for each head, in the query's type; softmax in float32.

    `upcast` computes the logits from float32 copies of query and key (config `upcast_attention`).
    Keys that are not `present` count for nothing: the plain products do that, whatever the kernel.
    """

    def __call__(
        self,
        query: Float[Array, "b s h d"],
        key: Float[Array, "b t h d"],
        value: Float[Array, "b t h d"],
        *,
        upcast: bool,
        precision: jax.lax.Precision,
        present: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b s h d"]: ...


@runtime_checkable  # beartype checks arguments against it in tests
class KernelFn(Protocol):
    """An AttentionFn to which all keys are present."""

    def __call__(
        self,
        query: Float[Array, "b s h d"],
        key: Float[Array, "b t h d"],
        value: Float[Array, "b t h d"],
        *,
        upcast: bool,
        precision: jax.lax.Precision,
    ) -> Float[Array, "b s h d"]: ...


@jax.named_scope("attention")
def dot_product_attention(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    *,
    upcast: bool,
    precision: jax.lax.Precision,
    is_causal: bool = False,
    present: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b s h d"]:
    """Attention written out (arXiv 1706.03762, equation 1); holds all s x t weights."""
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    if upcast:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = scale * jnp.einsum(
        "bshd,bthd->bhst", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    if is_causal:
        visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    if present is not None:
        logits = jnp.where(present[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, value, precision=precision)


@jax.named_scope("attention")
def per_head_attention(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    *,
    upcast: bool,
    precision: jax.lax.Precision,
    present: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b s h d"]:
    """The same attention for XLA:CPU: all in float32 (whatever `upcast`), long heads one by one.

    One head's weights stay in a core's cache between the passes over them, which a batch of heads
    does not: 31 against 141 ms of CPU for 4 heads of 1024 x 1024, forward and backward, of which
    the backward written out below is half (torch's fused kernel: 29).
    """
    if present is not None:
        return dot_product_attention(
            query, key, value, upcast=upcast, precision=precision, present=present
        )
    b, s, h, d = query.shape
    heads = [jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in (query, key, value)]
    if s * key.shape[1] >= LONG and b * h <= MAX_UNROLLED:
        flat = [x.reshape(b * h, -1, d) for x in heads]
        each = [_one_head(*(x[i] for x in flat), precision) for i in range(b * h)]
        y = jnp.stack(each).reshape(b, h, s, d)
    else:
        y = jax.vmap(jax.vmap(partial(_one_head, precision=precision)))(*heads)
    return jnp.swapaxes(y, 1, 2).astype(query.dtype)


def _one_head_value(
    query: Float[Array, "s d"],
    key: Float[Array, "t d"],
    value: Float[Array, "t d"],
    precision: jax.lax.Precision,
) -> Float[Array, "s d"]:
    return _one_head_forward(query, key, value, precision)[0]


def _one_head_forward(
    query: Array, key: Array, value: Array, precision: jax.lax.Precision
) -> tuple[Array, tuple[Array, ...]]:
    """Scale and normaliser go to the s x d sides, sparing two passes over the s x t weights."""
    query = query * query.shape[-1] ** -0.5
    logits = contract(query, key, 1, 1, precision)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    total = jnp.sum(weights, -1, keepdims=True)
    y = contract(weights, value, 1, 0, precision) / total
    return y, (query, key, value, weights, total, y)


def _one_head_backward(
    precision: jax.lax.Precision, kept: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    """d logits = weights / total * (d weights - sum(y dy)) (arXiv 2205.14135, appendix B.2).

    The gradients of key and value come out as (d, t) and are turned then: as (t, d) the product
    reads its large operand across rows, 3.4 against 1.1 ms. The barrier keeps XLA from undoing it.
    """
    query, key, value, weights, total, y = kept
    cotangent = cotangent / total
    to_value = jax.lax.optimization_barrier(contract(cotangent, weights, 0, 0, precision)).T
    to_weights = contract(cotangent, value, 1, 1, precision)
    to_logits = weights * (to_weights - jnp.sum(cotangent * y, -1, keepdims=True))
    to_query = contract(to_logits, key, 1, 0, precision) * query.shape[-1] ** -0.5
    to_key = jax.lax.optimization_barrier(contract(query, to_logits, 0, 0, precision)).T
    return to_query, to_key, to_value


_one_head = jax.custom_vjp(_one_head_value, nondiff_argnums=(3,))
_one_head.defvjp(_one_head_forward, _one_head_backward)


class Attention(nnx.Module):
    """Multi-head attention of `x` over `context` (over itself where none is given).

    With `skips_absent` a row of zeros in the context is a token that is not there.
    """

    def __init__(
        self,
        features: int,
        *,
        context_features: int,
        num_heads: int,
        upcast: bool,
        attention: AttentionFn,
        numerics: Numerics,
        rngs: nnx.Rngs,
        skips_absent: bool = False,
    ):
        common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}
        self.skips_absent = skips_absent
        self.to_q = Linear(features, features, use_bias=False, **common)
        self.to_k = Linear(context_features, features, use_bias=False, **common)
        self.to_v = Linear(context_features, features, use_bias=False, **common)
        self.to_out = nnx.List([Linear(features, features, **common)])
        self.num_heads = num_heads
        self.upcast = upcast
        self.attention = attention
        self.precision = numerics.precision

    def __call__(
        self, x: Float[Array, "b s c"], context: Float[Array, "b t d"] | None = None
    ) -> Float[Array, "b s c"]:
        context = x if context is None else context
        query, key, value = (
            split_heads(y, self.num_heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        present = jnp.any(context != 0, axis=-1) if self.skips_absent else None
        y = self.attention(
            query, key, value, upcast=self.upcast, precision=self.precision, present=present
        )
        return self.to_out[0](y.reshape(x.shape))


class GEGLU(nnx.Module):
    """A product gated by the exact (erf) GELU of its other half (arXiv 2002.05202)."""

    def __init__(self, features: int, hidden: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.proj = Linear(features, 2 * hidden, numerics=numerics, rngs=rngs)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s e"]:
        y, gate = self.proj.halves(x)
        return y * _gelu(gate)


def _gelu(x: Array) -> Array:
    """The exact GELU through erf, as torch computes it; `jax.nn.gelu` takes erfc, at 1.7 the cost
    of the whole GEGLU forward and backward on CPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


class FeedForward(nnx.Module):
    """GEGLU and a product back; places 0 and 2 of diffusers' `net`, whose 1 is a dropout."""

    def __init__(self, features: int, *, numerics: Numerics, rngs: nnx.Rngs):
        hidden = FEED_FORWARD_FACTOR * features
        self.net = nnx.Dict(
            {
                "0": GEGLU(features, hidden, numerics=numerics, rngs=rngs),
                "2": Linear(hidden, features, numerics=numerics, rngs=rngs),
            }
        )

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nnx.Module):
    """Self-attention, attention over the context, feed-forward (`BasicTransformerBlock`)."""

    def __init__(
        self,
        features: int,
        *,
        context_features: int,
        num_heads: int,
        upcast: bool,
        attention: AttentionFn,
        numerics: Numerics,
        rngs: nnx.Rngs,
        skips_absent: bool = False,
    ):
        common: dict[str, Any] = {
            "num_heads": num_heads,
            "upcast": upcast,
            "attention": attention,
            "numerics": numerics,
            "rngs": rngs,
        }
        self.norm1 = LayerNorm(features, numerics=numerics)
        self.attn1 = Attention(features, context_features=features, **common)
        self.norm2 = LayerNorm(features, numerics=numerics)
        self.attn2 = Attention(
            features, context_features=context_features, skips_absent=skips_absent, **common
        )
        self.norm3 = LayerNorm(features, numerics=numerics)
        self.ff = FeedForward(features, numerics=numerics, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b s c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b s c"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """A transformer block over the pixels, plus a shortcut (diffusers `Transformer2DModel`).

    The projections around it are linear in SD 2.x and 1x1 convolutions in 1.x: the same product,
    other kernel shapes.
    """

    def __init__(
        self,
        channels: int,
        *,
        context_features: int,
        num_heads: int,
        num_groups: int,
        use_linear_projection: bool,
        upcast: bool,
        attention: AttentionFn,
        numerics: Numerics,
        rngs: nnx.Rngs,
        skips_absent: bool = False,
    ):
        def projection() -> Linear | Conv2d:
            if use_linear_projection:
                return Linear(channels, channels, numerics=numerics, rngs=rngs)
            return Conv2d(channels, channels, 1, numerics=numerics, rngs=rngs)

        self.norm = GroupNorm(num_groups, channels, eps=TRANSFORMER_NORM_EPS, numerics=numerics)
        self.proj_in = projection()
        block = TransformerBlock(
            channels,
            context_features=context_features,
            num_heads=num_heads,
            upcast=upcast,
            attention=attention,
            numerics=numerics,
            rngs=rngs,
            skips_absent=skips_absent,
        )
        self.transformer_blocks = nnx.List([block])
        self.proj_out = projection()

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        y = self.transformer_blocks[0](y, context).reshape(b, h, w, c)
        return x + self.proj_out(y)


def split_heads(x: Float[Array, "b s c"], num_heads: int) -> Float[Array, "b s {num_heads} d"]:
    """The channels of `x`, head by head."""
    return x.reshape(*x.shape[:2], num_heads, -1)
