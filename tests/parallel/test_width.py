"""What devices that share the width of a layer send each other: kernels, not activations."""

import re
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sdx.models.attention import FeedForward
from sdx.models.layers import Numerics, PlaceFn
from sdx.models.module import Pure, pure
from sdx.parallel import sharding
from tests.micro import micro_mesh

WIDTH = 32
RULES = tuple(rule for rule in sharding.UNET_RULES if rule[0].startswith("ff/"))
EXCHANGE = re.compile(r"= (.*?) (all-to-all|collective-permute)(?:-start)?\(")


def feed_forward(over_width: PlaceFn | None) -> Pure:
    numerics = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.HIGHEST, over_width)
    return pure(
        lambda rngs: nnx.Dict({"ff": FeedForward(WIDTH, numerics=numerics, rngs=rngs)})["ff"]
    )


def gradients(network: Pure) -> Any:
    return jax.jit(jax.grad(lambda params, x: jnp.sum(network.apply(params, x) ** 2)))


def exchanged_numbers(text: str) -> int:
    """In all arrays that devices swap, gathers and sums not counted."""
    shapes = [re.findall(r"\[([\d,]+)", outcome) for outcome, _ in EXCHANGE.findall(text)]
    return sum(prod(map(int, dims.split(","))) for each in shapes for dims in each)


def test_halves_of_a_shared_layer_are_those_of_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 64)
    mesh = micro_mesh(8, data=2, fsdp=2, tensor=2)
    shared, plain = feed_forward(sharding.over_width(mesh)), feed_forward(None)
    params = plain.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(4, 64, WIDTH)).astype(np.float32)
    places = sharding.parameter_shardings({"ff": params}, mesh, RULES)["ff"]
    placed = jax.device_put(params, places), jax.device_put(x, sharding.batch_sharding(mesh))
    expected = gradients(plain)(params, x)
    compiled = {}
    for name, network in {"shared": shared, "plain": plain}.items():
        compiled[name] = gradients(network).lower(*placed).compile()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            compiled[name](*placed),
            expected,
        )
    numbers = {name: exchanged_numbers(one.as_text()) for name, one in compiled.items()}
    num_weights = 8 * WIDTH * WIDTH
    assert numbers["shared"] < num_weights / 2 < 2 * num_weights < numbers["plain"]


def test_a_width_that_does_not_divide_stays_whole() -> None:
    assert sharding.over_width(micro_mesh(8, data=4, fsdp=2)) is None
    place = sharding.over_width(micro_mesh(8, data=1, tensor=8))
    assert place is not None
    assert place(jnp.ones((2, 3))).sharding.is_fully_replicated
    placed: Any = place(jnp.ones((2, 16))).sharding
    assert placed.spec == P(None, "tensor")
