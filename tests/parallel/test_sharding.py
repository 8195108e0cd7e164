"""Where parameters and optimizer state lie: the table, its fall-back, and inheritance by path."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sdx.config.schema import TextEncoderConfig
from sdx.models.clip_text import CLIPTextModel
from sdx.models.module import pure
from sdx.parallel import sharding
from tests.micro import micro_mesh

pytestmark = pytest.mark.fast
RULES = ((r"to_q/kernel$", P("fsdp", "tensor")),)


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_rule_then_largest_divisible_dim_then_whole() -> None:
    mesh = micro_mesh(8, data=1, fsdp=4, tensor=2)
    params = {
        "to_q": {"kernel": leaf(256, 128), "bias": leaf(128)},
        "conv": {"kernel": leaf(3, 3, 60, 64)},
        "odd": {"kernel": leaf(3, 3, 77, 79)},
    }
    placed = sharding.parameter_shardings(params, mesh, RULES)
    assert placed["to_q"]["kernel"].spec == P("fsdp", "tensor")
    assert placed["to_q"]["bias"].spec == P()  # under 64 KiB
    assert placed["conv"]["kernel"].spec == P(None, None, None, "fsdp")
    assert placed["odd"]["kernel"].spec == P()  # no dim divides


def test_a_rule_that_does_not_divide_falls_back() -> None:
    mesh = micro_mesh(8, data=1, fsdp=4, tensor=2)
    placed = sharding.parameter_shardings({"to_q": {"kernel": leaf(256, 129)}}, mesh, RULES)
    assert placed["to_q"]["kernel"].spec == P("fsdp")


def test_a_rule_that_matches_nothing_fails() -> None:
    with pytest.raises(sharding.ShardingError, match="1 of 1 rules match no parameter: to_q"):
        sharding.parameter_shardings({"conv": leaf(8, 8)}, micro_mesh(), RULES)


def test_optimizer_state_lies_like_its_parameter() -> None:
    mesh = micro_mesh(8, data=1, fsdp=8)
    params = {"unet": {"a": {"kernel": leaf(256, 128)}, "b": {"kernel": leaf(128, 256)}}}
    placed = sharding.parameter_shardings(params, mesh)
    state = jax.eval_shape(optax.adamw(lambda count: 1e-3 * count).init, params)
    inherited = sharding.state_shardings(state, params, placed, mesh)
    adam = inherited[0]
    for moments in (adam.mu, adam.nu):
        assert moments["unet"]["a"]["kernel"].spec == P("fsdp")
        assert moments["unet"]["b"]["kernel"].spec == P(None, "fsdp")
    assert adam.count.spec == P()


def test_batches_are_split_over_data_and_fsdp() -> None:
    mesh = micro_mesh(8, data=2, fsdp=2, tensor=2)
    assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert sharding.batch_divisor(mesh) == 4


def test_nearly_all_of_a_text_encoder_is_shared() -> None:
    """SD 2.1's, which it takes no memory to describe."""
    config = TextEncoderConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    )
    text_encoder = pure(
        lambda rngs: CLIPTextModel(
            config,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            precision=jax.lax.Precision.DEFAULT,
            rngs=rngs,
        )
    )
    params = text_encoder.abstract()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 340_387_840
    mesh = micro_mesh(8, data=1, fsdp=8)
    placed = sharding.parameter_shardings(params, mesh, sharding.TEXT_ENCODER_RULES)
    whole = [
        leaf.size
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True)
        if place.is_fully_replicated
    ]
    assert sum(whole) / 340_387_840 < 0.001
    narrow = sharding.parameter_shardings(
        params, micro_mesh(8, data=1, fsdp=2, tensor=4), sharding.TEXT_ENCODER_RULES
    )["encoder"]["layers"]["22"]
    assert narrow["self_attn"]["v_proj"]["kernel"].spec == P("fsdp", "tensor")
    assert narrow["self_attn"]["out_proj"]["kernel"].spec == P("tensor", "fsdp")
    assert narrow["mlp"]["fc1"]["kernel"].spec == P("fsdp", "tensor")
    assert narrow["mlp"]["fc2"]["kernel"].spec == P("tensor", "fsdp")
