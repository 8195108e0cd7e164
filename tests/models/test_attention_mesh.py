"""Attention parted among eight devices: by examples, heads or queries; the numbers of one device,
and nobody computes what another does."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from sdx.config.compose import compose
from sdx.config.schema import AttentionConfig, AttentionKind, BlockSizesConfig, Platform
from sdx.models import attention_kernels
from sdx.models.attention import KernelFn, dot_product_attention, per_head_attention
from sdx.models.attention_choice import describe, select_attention
from sdx.models.attention_mesh import OverMesh
from sdx.training.program import Program, build
from sdx.training.step import draw_examples, loss_and_grads
from tests.micro import NUM_TOKENS, RESOLUTION, micro_config, micro_mesh

EXACT: dict[str, Any] = {"upcast": False, "precision": jax.lax.Precision.HIGHEST}
PLAIN = [dot_product_attention, per_head_attention]
LENGTH = 40
CAPTION = 23


def arrays(b: int, s: int, t: int, h: int, d: int = 8, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Query, key, value and the gradient of the outcome."""
    draw = np.random.default_rng(0).normal
    shapes = [(b, s, h, d), (b, t, h, d), (b, t, h, d), (b, s, h, d)]
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def outcome(attention: KernelFn, **options: Any) -> Any:
    """What comes out, and the gradients of what goes in."""

    def run(*given: jax.Array) -> list[jax.Array]:
        *inputs, gradient = given
        y, backward = jax.vjp(lambda *x: attention(*x, **EXACT, **options), *inputs)
        return [y, *backward(gradient)]

    return jax.jit(run)


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


def sizes(text: str) -> set[tuple[int, ...]]:
    """Of the arrays in a compiled program, which are those of one device."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}


@pytest.mark.parametrize("attention", PLAIN)
@pytest.mark.parametrize("num_keys", [LENGTH, CAPTION], ids=["self", "cross"])
def test_queries_are_split_by_length(attention: KernelFn, num_keys: int) -> None:
    """No device holds the logits of more than its own queries, forward or backward."""
    given = arrays(2, LENGTH, num_keys, 3)
    split = outcome(OverMesh(attention, micro_mesh(8, tensor=8), True)).lower(*given).compile()
    expected = outcome(attention)(*given)
    assert_same(split(*given), expected)
    logits = {size[-2:] for size in sizes(split.as_text()) if len(size) == 4}
    assert (LENGTH // 8, num_keys) in logits
    assert not {(LENGTH, num_keys), (num_keys, LENGTH)} & logits


@pytest.mark.parametrize(
    ("b", "h", "shards_sequence", "part"),
    [
        (8, 4, False, (2, 16, 2)),
        (3, 4, False, (3, 16, 2)),  # what does not divide stays whole
        (8, 3, False, (2, 16, 3)),
        (8, 4, True, (2, 8, 4)),  # the sequence over tensor, not heads
        (3, 3, True, (3, 8, 3)),
    ],
)
def test_devices_get_their_part(
    b: int, h: int, shards_sequence: bool, part: tuple[int, int, int]
) -> None:
    mesh, seen = micro_mesh(8, data=2, fsdp=2, tensor=2), []

    def attention(query: jax.Array, *keys: jax.Array, **options: Any) -> jax.Array:
        seen.append(query.shape)
        return dot_product_attention(query, *keys, **options)

    given = arrays(b, 16, 16, h)
    found = outcome(OverMesh(attention, mesh, shards_sequence))(*given)
    assert_same(found, outcome(dot_product_attention)(*given))
    assert {shape[:3] for shape in seen} == {part}


@pytest.mark.parametrize("attention", PLAIN)
def test_absent_keys_count_for_nothing_on_any_device(attention: KernelFn) -> None:
    given = arrays(4, 16, 6, 2)
    present = jnp.arange(6)[None] < jnp.array([[1], [3], [6], [2]])
    spread = OverMesh(attention, micro_mesh(8, data=2, fsdp=2, tensor=2), True)
    expected = outcome(dot_product_attention, present=present)(*given)
    assert_same(outcome(spread, present=present)(*given), expected)
    assert not np.allclose(expected[0], outcome(dot_product_attention)(*given)[0], atol=1e-3)


@pytest.mark.parametrize("shards_sequence", [False, True])
def test_a_kernel_over_eight_devices(
    shards_sequence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries are split before they are padded, so that every device has its share of real ones."""
    real = attention_kernels.splash.make_splash_mha
    monkeypatch.setattr(attention_kernels.splash, "make_splash_mha", partial(real, interpret=True))
    given = arrays(4, 144, 144, 2)
    kernel = attention_kernels.splash_attention(BlockSizesConfig())
    spread = OverMesh(kernel, micro_mesh(8, data=2, fsdp=2, tensor=2), shards_sequence)
    assert_same(outcome(spread)(*given), outcome(dot_product_attention)(*given))


@pytest.fixture
def has_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX believes in a cuDNN: enough to lower for a GPU that is not here."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    yield


@pytest.mark.parametrize(
    ("shards_sequence", "query", "key"),
    [(False, "2x256x2x64", "2x256x2x64"), (True, "2x128x4x64", "2x256x4x64")],
)
def test_cudnn_is_called_with_the_part_of_a_device(
    has_cudnn: None, shards_sequence: bool, query: str, key: str
) -> None:
    """Forward and backward, for GPUs; JAX's own partitioning refuses some shardings it is given."""
    mesh = micro_mesh(8, data=2, fsdp=2, tensor=2)
    config = AttentionConfig(kind=AttentionKind.cudnn, shard_sequence=shards_sequence)
    attention = select_attention(config, Platform.gpu, dtype="bfloat16", mesh=mesh)
    given = arrays(8, 256, 256, 4, 64, jnp.bfloat16)
    lowered = outcome(attention).trace(*given).lower(lowering_platforms=("cuda",))
    calls = [line for line in lowered.as_text().splitlines() if "@__cudnn$fmha" in line]
    assert len(calls) == 2 and "CustomSPMDPartitioning" not in lowered.as_text()
    operands = [re.findall(r"tensor<([\dx]+)xbf16>", line.partition(" : ")[2]) for line in calls]
    assert all(found[:3] == [query, key, key] for found in operands)


def micro_program(num_devices: int, shard_sequence: bool, **axes: int) -> Program:
    config = micro_config(global_batch_size=4)
    config.attention.shard_sequence = shard_sequence
    return build(config, micro_mesh(num_devices, **axes), max_steps=10)


def test_loss_and_gradients_are_those_of_one_device() -> None:
    """Self- and cross-attention of the whole UNet; heads, of which there are 2, could not be."""
    spread, one = micro_program(8, True, tensor=8), micro_program(1, False)
    draw = np.random.default_rng(0).normal
    side = RESOLUTION // 2
    params = jax.tree.map(
        lambda leaf: draw(scale=0.4, size=leaf.shape).astype(leaf.dtype), one.abstract_state.params
    )
    moments = jnp.asarray(draw(size=(4, side, side, 8)), jnp.float32)
    context = jnp.asarray(draw(size=(4, NUM_TOKENS, 8)), jnp.float32)

    def gradient(program: Program) -> Any:
        examples = draw_examples(program.rule, jnp.int32(3), moments, context, jnp.ones(4))
        compute = jax.jit(partial(loss_and_grads, program.rule))
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), params, program.abstract_state.params
        )
        examples = jax.device_put(examples, jax.NamedSharding(program.mesh, jax.P()))
        compiled = compute.lower(placed, examples).compile()
        return compiled(placed, examples), sizes(compiled.as_text() or "")

    (loss, grads), local = gradient(spread)
    (expected, expected_grads), whole = gradient(one)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for found, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        scale = float(jnp.max(jnp.abs(right)))
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * scale)
    logits = {(4, 2, side**2, keys) for keys in (side**2, NUM_TOKENS)}
    parts = {(4, 2, side**2 // 8, keys) for keys in (side**2, NUM_TOKENS)}
    assert logits <= whole and not parts & whole
    assert parts <= local and not logits & local


@pytest.mark.fast
def test_the_choice_says_how_queries_are_split() -> None:
    mesh = micro_mesh(8, fsdp=2, tensor=4)
    found = compose(["model=sd21"]).model
    config = AttentionConfig(shard_sequence=True)
    choice = select_attention(config, Platform.tpu, dtype="bfloat16", mesh=mesh)
    said = describe(choice, found, 96, mask_padding_tokens=True)
    assert said["9216 x 9216"] == "flash on 1/4 of the queries"
    assert said["autoencoder"] == said["144 x 77"] == "dot_product on 1/4 of the queries"
    plain = select_attention(config, Platform.cpu, dtype="float32", mesh=mesh)
    assert set(describe(plain, found, 96).values()) == {"per_head on 1/4 of the queries"}
    config.shard_sequence = False
    for one in (mesh, micro_mesh(1)):
        choice = select_attention(config, Platform.tpu, dtype="bfloat16", mesh=one)
        assert describe(choice, found, 96)["9216 x 9216"] == "flash"
