"""Which attention runs where: a kernel for long sequences, the plain products for the others.

The choice follows from shapes alone, so that what a run will use can be told before it compiles.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sdx.config.resolve import AUTO_ATTENTION, CUDNN_HEAD_DIM, CUDNN_HEAD_DIM_UNIT
from sdx.config.schema import AttentionConfig, AttentionKind, DownBlock, ModelConfig, Platform
from sdx.models.attention import AttentionFn, dot_product_attention, per_head_attention

CUDNN_DTYPES = ("bfloat16", "float16")
PALLAS_HEAD_DIM = 256  # a tile of the autoencoder's 512 would not fit the memory beside its like


@dataclass(frozen=True, eq=False)  # networks hold it, and must be hashable
class ByShape:
    """Attention (an AttentionFn) by `kernel` where it is worth it and allowed, else by `plain`."""

    kind: AttentionKind
    kernel: AttentionFn
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
    ) -> Float[Array, "b s h d"]:
        fits = self.takes(query.shape[1], key.shape[1], query.shape[3])
        attention = self.kernel if fits else self.plain
        return attention(query, key, value, upcast=upcast, precision=precision)


def select_attention(
    config: AttentionConfig, platform: Platform, *, dtype: str, mesh: Mesh | None = None
) -> AttentionFn:
    """The attention function of `config` for activations of `dtype`; auto picks by platform."""
    kind = AUTO_ATTENTION[platform] if config.kind is AttentionKind.auto else config.kind
    if kind is AttentionKind.per_head:
        return per_head_attention
    plain = dot_product_attention if config.split_head_dim else _folded
    if kind is AttentionKind.dot_product:
        return plain
    return ByShape(kind, _kernel(kind, config, mesh), plain, config.min_sequence, dtype)


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
        over_caption = dot_product_attention if mask_padding_tokens else attention
        chosen[f"{pixels} x {num_tokens}"] = _name(over_caption, pixels, num_tokens, head_dim)
    return chosen


def _kernel(kind: AttentionKind, config: AttentionConfig, mesh: Mesh | None) -> AttentionFn:
    from sdx.models import attention_kernels as kernels  # Pallas: 0.2 s, for accelerators alone

    if kind is AttentionKind.cudnn:
        return kernels.cudnn_attention
    make = {
        AttentionKind.flash: kernels.flash_attention,
        AttentionKind.splash: kernels.splash_attention,
    }[kind]
    return make(config.block_sizes, mesh)


def _name(attention: AttentionFn, num_queries: int, num_keys: int, head_dim: int) -> str:
    if isinstance(attention, ByShape):
        fits = attention.takes(num_queries, num_keys, head_dim)
        return attention.kind.name if fits else _name(attention.plain, 0, 0, 0)
    return "per_head" if attention is per_head_attention else "dot_product"


def _folded(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    *,
    upcast: bool,
    precision: jax.lax.Precision,
) -> Float[Array, "b s h d"]:
    """`dot_product_attention` with heads folded into the batch: another layout, nothing else."""
    b, s, h, d = query.shape
    fold = (x.swapaxes(1, 2).reshape(b * h, -1, 1, d) for x in (query, key, value))
    y = dot_product_attention(*fold, upcast=upcast, precision=precision)
    return y.reshape(b, h, s, d).swapaxes(1, 2)
