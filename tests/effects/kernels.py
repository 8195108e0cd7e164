"""`attention.*`: which kernel a UNet's attention is traced with, and in which tiles.

The kernels of accelerators are traced, not run.
"""

from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdx.models import attention_kernels
from tests.effects.effect import Case, Effect
from tests.effects.tracing import Observer, heads, network, operations, primitives

SIDE = 32  # latents, so that self-attention is over 1,024 tokens


def written_out(case: Case) -> int:
    """Attentions with a gradient of their own: functions of query, key and value."""
    own = [one for one in network(case, "unet") if one.primitive.name == "custom_vjp_call"]
    return sum(len(one.invars) == 3 for one in own)


def states_attended(case: Case) -> dict[str, int]:
    """States of a caption of one token between its two ends that cross-attention is shown, and in
    how many places the UNet looks which those are."""
    tokens = jnp.full((1, 77), 583).at[0, :2].set(jnp.array([582, 5]))  # ends and pads with 583
    encoder = case.program.networks.text_encoder
    states = jax.jit(encoder.apply)(encoder.init(jax.random.key(0)), tokens)
    looks = primitives("unet", "reduce_or")(case)
    return {
        "states": int(jnp.any(states != 0, axis=-1).sum()),
        "attentions that look": looks.get("reduce_or", 0),
    }


def queries(case: Case) -> set[int]:
    """Of which a device computes the logits, self- and cross-attention."""
    products = [one for one in network(case, "unet") if one.primitive.name == "dot_general"]
    by_head = [one for one in products if len(one.params["dimension_numbers"][1][0]) == 2]
    logits = {one.outvars[0].aval.shape for one in by_head}
    return {shape[2] for shape in logits if shape[3] in (4, 77)}


def fused(case: Case) -> dict[str, int]:
    """Kernels that long self-attention is traced to, and how many."""
    return {name: count for name, count in long_attention(case)[0].items() if name == "pallas_call"}


def tile(name: str) -> Observer:
    """A block size of the splash kernel of long self-attention."""
    return lambda case: getattr(long_attention(case)[1], name)


@cache
def long_attention(case: Case) -> tuple[Counter[str], Any]:
    """The operations of the UNet over 1,024 tokens, and the block sizes of the first kernel."""
    sizes: list[Any] = []
    make = attention_kernels.splash.make_splash_mha

    def noted(mask: Any, *, block_sizes: Any, **options: Any) -> Any:
        sizes.append(block_sizes)
        return make(mask, block_sizes=block_sizes, **options)

    unet = case.program.networks.unet
    shapes = ((1, SIDE, SIDE, 4), jnp.float32), ((1,), jnp.int32), ((1, 77, 64), jnp.float32)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernels.splash, "make_splash_mha", noted)
        jaxpr = jax.make_jaxpr(lambda *args: unet.apply(*args))(unet.abstract(), *arrays)
    return Counter(one.primitive.name for one in operations(jaxpr.jaxpr)), (sizes or [None])[0]


FLASH = ("hardware.platform=tpu", "attention=flash")
SPLASH = ("hardware.platform=tpu", "attention=splash")
BLOCKS = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
          "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")  # fmt: skip

EFFECTS = [
    Effect(
        "attention.kind",
        "dot_product",
        written_out,
        8,  # what auto picks on CPU
        0,
    ),
    Effect(
        "attention.shard_sequence",
        "true",
        queries,
        {4},
        {2},  # of the 2 x 2 latents
        given=("mesh=dp", "hardware.num_devices=2", "mesh.ici.tensor=2"),
    ),
    Effect("attention.min_sequence", "2048", fused, {"pallas_call": 4}, {}, given=FLASH),
    Effect(
        "attention.split_head_dim",
        "false",
        lambda case: set(heads("unet")(case)),
        {2},
        {1},  # they are examples
        given=("attention=dot_product",),
    ),
    Effect(
        "attention.mask_padding_tokens",
        "true",
        states_attended,
        {"states": 77, "attentions that look": 0},
        {"states": 3, "attentions that look": 4},
    ),
    *(
        Effect(f"attention.block_sizes.{name}", "256", tile(name), 512, 256, given=SPLASH)
        for name in BLOCKS
    ),
]
