"""Fused attention: cuDNN's on GPUs, Pallas' flash and splash kernels on TPUs.

All compute what `dot_product_attention` does, softmax and accumulation in float32, without holding
the weights of all pairs. The Pallas kernels want lengths in whole tiles: queries and keys are
padded with zeros, and padded keys are masked. Each is the kernel of one device: the compiler does
not split a Pallas call, and refuses cuDNN's where the axes it picked part head dims or lengths
("Sharding on head dim is not allowed"), so that over a mesh they run as attention_mesh.py says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int32

from sdx.config.schema import BlockSizesConfig

LANES = 128  # of a TPU's vector unit: the least tile of keys and queries
TILES = (512, 384, 256, 128)  # the first that divides a padded length is taken
HEAD_DIM_UNIT = 64  # head dims are padded with zeros to a multiple

Kernel = Callable[[Array, Array, Array], Array]
"""(query, key, value), each (b, h, length, d), to (b, h, s, d)."""


@jax.named_scope("attention")
def cudnn_attention(
    query: Float[Array, "b s h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    *,
    upcast: bool,
    precision: jax.lax.Precision,
) -> Float[Array, "b s h d"]:
    """cuDNN's fused kernel, for bfloat16 and float16; accumulates in float32 whatever `upcast` and
    `precision`. Its errors are raised: nothing falls back."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one call, and the lengths they divide."""

    blocks: BlockSizesConfig
    num_queries: int
    num_keys: int


@dataclass(frozen=True, eq=False)  # networks hold it, and must be hashable
class PallasAttention:
    """Attention by one of the Pallas kernels."""

    make_kernel: Callable[[Tiles, int], Kernel]
    block_sizes: BlockSizesConfig

    @jax.named_scope("attention")
    def __call__(
        self,
        query: Float[Array, "b s h d"],
        key: Float[Array, "b t h d"],
        value: Float[Array, "b t h d"],
        *,
        upcast: bool,
        precision: jax.lax.Precision,
    ) -> Float[Array, "b s h d"]:
        """In the query's type; the products are those of the TPU's matrix unit, accumulated in
        float32 whatever `upcast` and `precision`."""
        (_, s, _, d), t = query.shape, key.shape[1]
        tiles = choose_tiles(self.block_sizes, s, t)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (query * d**-0.5, key, value))
        lengths = (tiles.num_queries, tiles.num_keys, tiles.num_keys)
        q, k, v = (_pad(x, n) for x, n in zip(heads_first, lengths, strict=True))
        y = self.make_kernel(tiles, t)(q, k, v)
        return jnp.swapaxes(y[:, :, :s, :d], 1, 2).astype(query.dtype)


def flash_attention(block_sizes: BlockSizesConfig) -> PallasAttention:
    """FlashAttention-2 for TPUs, jax.experimental.pallas.ops.tpu.flash_attention."""
    return PallasAttention(_flash, block_sizes)


def splash_attention(block_sizes: BlockSizesConfig) -> PallasAttention:
    """The sparse-mask kernel with a full mask, jax.experimental.pallas.ops.tpu.splash_attention."""
    return PallasAttention(_splash, block_sizes)


def choose_tiles(given: BlockSizesConfig, num_queries: int, num_keys: int) -> Tiles:
    """`given` completed: the largest of `TILES` that needs no more padding than one lane tile does;
    a tile that is given is cut to the padded length, and lengths are padded to whole tiles."""
    q, kv = _tile(given.block_q, num_queries), _tile(given.block_kv, num_keys)
    chosen = replace(
        given,
        block_q=q,
        block_kv=kv,
        block_q_dkv=_tile(given.block_q_dkv or q, num_queries),
        block_q_dq=_tile(given.block_q_dq or q, num_queries),
        block_kv_dkv=_tile(given.block_kv_dkv or kv, num_keys),
        block_kv_dq=_tile(given.block_kv_dq or kv, num_keys),
    )
    chosen = replace(
        chosen,
        block_kv_compute=_part(given.block_kv_compute, chosen.block_kv),
        block_kv_dkv_compute=_part(given.block_kv_dkv_compute, chosen.block_kv_dkv),
    )
    of_queries = (chosen.block_q, chosen.block_q_dkv, chosen.block_q_dq)
    of_keys = (chosen.block_kv, chosen.block_kv_dkv, chosen.block_kv_dq)
    return Tiles(chosen, _whole(num_queries, of_queries), _whole(num_keys, of_keys))


def _flash(tiles: Tiles, num_keys: int) -> Kernel:
    blocks: Any = tiles.blocks
    sizes = flash.BlockSizes(
        block_q=blocks.block_q,
        block_k_major=blocks.block_kv,
        block_k=blocks.block_kv_compute,
        block_b=1,
        block_q_major_dkv=blocks.block_q_dkv,
        block_q_dkv=blocks.block_q_dkv,
        block_k_major_dkv=blocks.block_kv_dkv,
        block_k_dkv=blocks.block_kv_dkv_compute,
        block_q_dq=blocks.block_q_dq,
        block_k_major_dq=blocks.block_kv_dq,
        block_k_dq=blocks.block_kv_dq,
    )

    def run(query: Array, key: Array, value: Array) -> Array:
        ids = None
        if tiles.num_keys != num_keys:
            of_queries = jnp.ones((len(query), tiles.num_queries), jnp.int32)
            ids = flash.SegmentIds(of_queries, _real(len(query), num_keys, tiles.num_keys))
        return flash.flash_attention(query, key, value, segment_ids=ids, block_sizes=sizes)

    return run


def _splash(tiles: Tiles, num_keys: int) -> Kernel:
    sizes = splash.BlockSizes(
        **{name: getattr(tiles.blocks, name) for name in tiles.blocks.__dataclass_fields__}
    )

    def run(query: Array, key: Array, value: Array) -> Array:
        b, h = query.shape[:2]
        full = masks.FullMask((tiles.num_queries, tiles.num_keys))
        one: Any = splash.make_splash_mha(
            masks.MultiHeadMask([full] * h), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
        if tiles.num_keys == num_keys:
            return jax.vmap(one)(query, key, value)
        of_queries = jnp.ones((b, tiles.num_queries), jnp.int32)
        ids = splash.SegmentIds(of_queries, _real(b, num_keys, tiles.num_keys))
        return jax.vmap(one)(query, key, value, ids)

    return run


def _real(num_examples: int, num_keys: int, padded: int) -> Int32[Array, "b t"]:
    """1 for keys, 0 for padding."""
    row = (jnp.arange(padded) < num_keys).astype(jnp.int32)
    return jnp.broadcast_to(row, (num_examples, padded))


def _pad(x: Array, length: int) -> Array:
    """Zeros up to `length`, and to a head dim that the kernels take."""
    d = x.shape[3]
    width = math.ceil(d / HEAD_DIM_UNIT) * HEAD_DIM_UNIT
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, width - d)))


def _tile(given: int | None, length: int) -> int:
    whole = _whole(length, (LANES,))
    if given is not None:
        return min(given, whole)
    return next(tile for tile in TILES if whole % tile == 0)


def _part(given: int | None, of: int | None) -> int | None:
    return of if given is None or of is None else min(given, of)


def _whole(length: int, tiles: Any) -> int:
    unit = math.lcm(*tiles)
    return math.ceil(length / unit) * unit
