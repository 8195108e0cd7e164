"""Kernels of accelerators against the plain products; what runs where. Numbers come from Pallas'
interpreter on CPU, and that TPUs take the kernels from their lowering (test_attention_tpu.py
compiles them): none of it ran on one."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from sdx.config.compose import compose
from sdx.config.schema import AttentionConfig, AttentionKind, BlockSizesConfig, Platform
from sdx.models import attention_kernels
from sdx.models.attention import KernelFn, dot_product_attention, per_head_attention
from sdx.models.attention_choice import ByShape, describe, select_attention
from sdx.models.attention_kernels import PallasAttention, choose_tiles, flash_attention

PALLAS = [AttentionKind.flash, AttentionKind.splash]
EXACT: dict[str, Any] = {"upcast": False, "precision": jax.lax.Precision.HIGHEST}
MODELS = {
    "sd21": [(9216, 64), (2304, 64), (576, 64), (144, 64)],
    "sd21_base": [(4096, 64), (1024, 64), (256, 64)],
    "sd15": [(4096, 40), (1024, 80), (256, 160)],
}


def arrays(b: int, s: int, t: int, h: int, d: int, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Query, key, value and the gradient of the outcome."""
    draw = np.random.default_rng(0).normal
    shapes = [(b, s, h, d), (b, t, h, d), (b, t, h, d), (b, s, h, d)]
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def outcome(attention: KernelFn, *given: jax.Array) -> list[jax.Array]:
    """What comes out, and the gradients of what goes in."""

    def run(*given: jax.Array) -> list[jax.Array]:
        *inputs, gradient = given
        y, backward = jax.vjp(lambda *x: attention(*x, **EXACT), *inputs)
        return [y, *backward(gradient)]

    return jax.jit(run)(*given)


def make(kind: AttentionKind, **options: Any) -> PallasAttention:
    blocks = BlockSizesConfig(**options.pop("blocks", {}))
    return getattr(attention_kernels, f"{kind.name}_attention")(blocks, **options)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pallas on this CPU; splash under vmap is taken by its own, older interpreter alone."""
    real = attention_kernels.splash.make_splash_mha
    monkeypatch.setattr(attention_kernels.splash, "make_splash_mha", partial(real, interpret=True))
    return lambda kind: (
        tpu.force_tpu_interpret_mode() if kind is AttentionKind.flash else contextlib.nullcontext()
    )


@pytest.mark.parametrize("kind", PALLAS)
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((1, 256, 256, 2, 16), {"block_q": 128, "block_kv": 256, "block_kv_compute": 128}),
        ((2, 144, 77, 1, 40), {}),  # both padded, the keys masked
    ],
)
def test_kernels_are_the_plain_products(
    kind: AttentionKind, shape: Any, blocks: Any, interpreted: Callable[[AttentionKind], Any]
) -> None:
    given = arrays(*shape)
    expected = outcome(dot_product_attention, *given)
    with interpreted(kind):
        found = jax.block_until_ready(outcome(make(kind, blocks=blocks), *given))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("kind", PALLAS)
@pytest.mark.parametrize(("length", "head_dim"), [*MODELS["sd21"][:3], *MODELS["sd15"]])
def test_tpus_take_the_kernels_of_every_level(
    kind: AttentionKind, length: int, head_dim: int
) -> None:
    """Lowered for a TPU that is not here: forward, and both kernels of the backward."""
    inputs = [jax.ShapeDtypeStruct((1, length, 2, head_dim), jnp.bfloat16)] * 3

    def total(*x: jax.Array) -> jax.Array:
        return jnp.sum(make(kind)(*x, **EXACT).astype(jnp.float32))

    lowered = jax.jit(jax.grad(total, (0, 1, 2))).trace(*inputs).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3


@pytest.mark.fast
def test_tiles_divide_padded_lengths() -> None:
    sizes = choose_tiles(BlockSizesConfig(), 4096, 77)
    assert (sizes.num_queries, sizes.num_keys) == (4096, 128)
    assert (sizes.blocks.block_q, sizes.blocks.block_kv_compute) == (512, 128)
    assert choose_tiles(BlockSizesConfig(), 2304, 2304).blocks.block_q == 384
    assert choose_tiles(BlockSizesConfig(), 576, 576).num_keys == 640
    given = BlockSizesConfig(block_q=256, block_q_dq=384, block_kv=1024, block_kv_dkv_compute=128)
    sizes = choose_tiles(given, 600, 600)
    assert sizes.num_queries == 768 and sizes.num_keys == 640
    blocks = sizes.blocks
    assert (blocks.block_q_dkv, blocks.block_q_dq, blocks.block_kv) == (256, 384, 640)
    assert (blocks.block_kv_compute, blocks.block_kv_dkv_compute) == (640, 128)


@pytest.mark.fast
def test_folding_heads_into_the_batch_changes_nothing() -> None:
    given = arrays(2, 16, 9, 3, 8)
    config = AttentionConfig(kind=AttentionKind.dot_product, split_head_dim=False)
    folded = select_attention(config, Platform.gpu, dtype="float32")
    assert folded is not dot_product_attention
    found, expected = outcome(folded, *given), outcome(dot_product_attention, *given)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def chosen(kind: str, platform: str, model: str, dtype: str = "bfloat16", **keys: Any) -> Any:
    config = AttentionConfig(kind=AttentionKind[kind], **keys)
    attention = select_attention(config, Platform[platform], dtype=dtype)
    found = compose([f"model={model}"]).model
    return describe(attention, found, found.resolution // found.vae.factor)


@pytest.mark.fast
def test_auto_picks_by_platform_length_and_type() -> None:
    assert select_attention(AttentionConfig(), Platform.cpu, dtype="float32") is per_head_attention
    on_tpu = chosen("auto", "tpu", "sd21")
    assert on_tpu == {
        "autoencoder": "dot_product",  # one head of 512
        "9216 x 9216": "flash", "9216 x 77": "dot_product",
        "2304 x 2304": "flash", "2304 x 77": "dot_product",
        "576 x 576": "flash", "576 x 77": "dot_product",
        "144 x 144": "dot_product", "144 x 77": "dot_product",
    }  # fmt: skip
    on_gpu = chosen("auto", "gpu", "sd15")
    fused = {size for size, name in on_gpu.items() if name == "cudnn"}
    assert fused == {"4096 x 4096", "1024 x 1024"}  # 256 tokens have head dim 160
    assert set(chosen("auto", "gpu", "sd15", "float32").values()) == {"dot_product"}
    assert set(chosen("auto", "cpu", "sd21", "float32").values()) == {"per_head"}
    low = chosen("splash", "tpu", "sd21", min_sequence=77)
    assert [size for size, name in low.items() if name != "splash"] == ["autoencoder"]


@pytest.mark.fast
def test_cudnn_is_asked_for_where_it_is_picked_and_never_elsewhere() -> None:
    """Its kernel is in the program for GPUs; here its absence is an error, not another kernel."""
    attention = select_attention(AttentionConfig(), Platform.gpu, dtype="bfloat16")
    assert isinstance(attention, ByShape)
    long, short = arrays(1, 256, 256, 1, 64, jnp.bfloat16)[:3], arrays(1, 16, 16, 1, 64)[:3]
    expected = dot_product_attention(*short, **EXACT)
    np.testing.assert_array_equal(attention(*short, **EXACT), expected)
    with pytest.raises(Exception, match="(?i)cudnn"):
        jax.block_until_ready(attention(*long, **EXACT))


@pytest.mark.fast
def test_pallas_kernels_are_what_networks_can_hold() -> None:
    assert isinstance(hash(flash_attention(BlockSizesConfig())), int)
