"""Which attention runs where: a kernel for long sequences, the plain products for the others.

The choice follows from shapes alone, so that what a run will use can be told before it compiles.
Self-attention has as many keys as queries; cross-attention has the caption's 77, so that the rule
of `min_sequence` leaves it to the plain products. The text encoder's attention, causal over 77
tokens, is none of this: plain, its heads over axis tensor by the rules of its weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sdx.config.resolve import AUTO_ATTENTION, CUDNN_HEAD_DIM, CUDNN_HEAD_DIM_UNIT
from sdx.config.schema import AttentionConfig, AttentionKind, DownBlock, ModelConfig, Platform
from sdx.models.attention import AttentionFn, KernelFn, dot_product_attention, per_head_attention
from sdx.models.attention_mesh import OverMesh

CUDNN_DTYPES = ("bfloat16", "float16")
PALLAS_HEAD_DIM = 256  # a tile of the autoencoder's 512 would not fit the memory beside its like


@dataclass(frozen=True, eq=False)  # networks hold it, and must be hashable
class ByShape:
    """Attention (an AttentionFn) by `kernel` where it is worth it and allowed, else by `plain`."""

    kind: AttentionKind
    kernel: KernelFn
    plain: AttentionFn
    min_sequence: int
    dtype: str

    def takes(self, num_queries: int, num_keys: int, head_dim: int) -> bool:
        """Whether the kernel computes attention of these sizes."""
        is_long = min(num_queries, num_keys) >= self.min_sequence
        return is_long and refusal(self.kind, head_dim, self.dtype) is None

    def __call__(
        self,
        query: Float[Array, "b s h d"],
        key: Float[Array, "b t h d"],
        value: Float[Array, "b t h d"],
        *,
        upcast: bool,
        precision: jax.lax.Precision,
        present: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b s h d"]:
        how: dict[str, Any] = {"upcast": upcast, "precision": precision}
        fits = self.takes(query.shape[1], key.shape[1], query.shape[3])
        if fits and present is None:
            return self.kernel(query, key, value, **how)
        return self.plain(query, key, value, **how, present=present)


def select_attention(
    config: AttentionConfig, platform: Platform, *, dtype: str, mesh: Mesh | None = None
) -> AttentionFn:
    """The attention function of `config` for activations of `dtype`; auto picks by platform."""
    kind = AUTO_ATTENTION[platform] if config.kind is AttentionKind.auto else config.kind
    plain = dot_product_attention if config.split_head_dim else _folded
    if kind is AttentionKind.per_head:
        plain = per_head_attention
    kernel, shards = _kernel(kind, config), config.shard_sequence
    if mesh is not None and mesh.size > 1:
        shards = shards and mesh.shape["tensor"] > 1
        plain = OverMesh(plain, mesh, shards) if shards else plain
        kernel = kernel and OverMesh(kernel, mesh, shards)
    if kernel is None:
        return plain
    return ByShape(kind, kernel, plain, config.min_sequence, dtype)


def refusal(kind: AttentionKind, head_dim: int, dtype: str) -> str | None:
    """Why the kernel cannot compute attention of that kind; None where it can."""
    if kind is AttentionKind.cudnn:
        if dtype not in CUDNN_DTYPES:
            return f"takes {' or '.join(CUDNN_DTYPES)}, not {dtype}"
        if head_dim > CUDNN_HEAD_DIM or head_dim % CUDNN_HEAD_DIM_UNIT:
            return f"takes head dims up to {CUDNN_HEAD_DIM} in steps of 8, not {head_dim}"
    elif head_dim > PALLAS_HEAD_DIM:
        return f"takes head dims up to {PALLAS_HEAD_DIM}, not {head_dim}"
    return None


def describe(
    attention: AttentionFn, model: ModelConfig, side: int, *, mask_padding_tokens: bool = False
) -> dict[str, str]:
    """What computes each attention of `model` over latents of `side` by `side`, by its sizes."""
    unet, num_tokens = model.unet, model.text_encoder.max_position_embeddings
    levels = list(
        zip(unet.block_out_channels, unet.attention_head_dim, unet.down_block_types, strict=True)
    )
    chosen = {"autoencoder": _name(attention, side**2, side**2, model.vae.block_out_channels[-1])}
    for level, (channels, heads, kind) in enumerate(levels):
        if kind is not DownBlock.CrossAttnDownBlock2D and level + 1 < len(levels):
            continue  # the middle attends at the last level, whatever its own blocks do
        pixels, head_dim = (side >> level) ** 2, channels // heads
        chosen[f"{pixels} x {pixels}"] = _name(attention, pixels, pixels, head_dim)
        chosen[f"{pixels} x {num_tokens}"] = _name(
            attention, pixels, num_tokens, head_dim, masked=mask_padding_tokens
        )
    return chosen


def _kernel(kind: AttentionKind, config: AttentionConfig) -> KernelFn | None:
    if kind in (AttentionKind.dot_product, AttentionKind.per_head):
        return None
    from sdx.models import attention_kernels as kernels  # Pallas: 0.2 s, for accelerators alone

    if kind is AttentionKind.cudnn:
        return kernels.cudnn_attention
    make = {
        AttentionKind.flash: kernels.flash_attention,
        AttentionKind.splash: kernels.splash_attention,
    }[kind]
    return make(config.block_sizes)


def _name(
    attention: KernelFn, num_queries: int, num_keys: int, head_dim: int, *, masked: bool = False
) -> str:
    if isinstance(attention, ByShape):
        fits = not masked and attention.takes(num_queries, num_keys, head_dim)
        if not fits:
            return _name(attention.plain, num_queries, num_keys, head_dim, masked=masked)
        return attention.kind.name + _share(attention.kernel)
    if isinstance(attention, OverMesh):
        inner = _name(attention.attention, num_queries, num_keys, head_dim, masked=masked)
        return inner + _share(attention)
    return "per_head" if attention is per_head_attention and not masked else "dot_product"


def _share(attention: KernelFn) -> str:
    if isinstance(attention, OverMesh) and attention.shards_sequence:
        return f" on 1/{attention.mesh.shape['tensor']} of the queries"
    return ""


def _folded(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    *,
    upcast: bool,
    precision: jax.lax.Precision,
    present: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b s h d"]:
    """`dot_product_attention` with heads folded into the batch: another layout, nothing else."""
    b, s, h, d = query.shape
    fold = (x.swapaxes(1, 2).reshape(b * h, -1, 1, d) for x in (query, key, value))
    masks = None if present is None else jnp.repeat(present, h, axis=0)
    y = dot_product_attention(*fold, upcast=upcast, precision=precision, present=masks)
    return y.reshape(b, h, s, d).swapaxes(1, 2)
