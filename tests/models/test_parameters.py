"""The real models have the parameters of diffusers and transformers: names, shapes, counts."""

import math
import warnings
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sdx.config.compose import compose
from sdx.config.schema import ModelConfig
from sdx.models.attention import dot_product_attention
from sdx.models.layers import Linear, Numerics, ResnetBlock
from sdx.models.module import Params, Pure, flat, nested, pure
from sdx.models.networks import make_networks
from sdx.weights.names import array_to_torch, from_torch, to_torch
from tests.micro import micro_mesh

COUNTS = {
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480},
}


def torch_shapes(model: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensor names and shapes of the libraries' own networks, without their memory."""
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        diffusers: Any = import_module("diffusers")  # its stubs hide the classes it exports
        transformers: Any = import_module("transformers")
        unet = model.unet
        kinds = [kind.name for kind in unet.down_block_types]
        networks = {
            "unet": diffusers.UNet2DConditionModel(
                block_out_channels=tuple(unet.block_out_channels),
                down_block_types=tuple(kinds),
                up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
                attention_head_dim=tuple(unet.attention_head_dim),
                cross_attention_dim=unet.cross_attention_dim,
                use_linear_projection=unet.use_linear_projection,
            ),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=tuple(model.vae.block_out_channels),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text_encoder": transformers.CLIPTextModel(
                transformers.CLIPTextConfig(
                    hidden_size=model.text_encoder.hidden_size,
                    intermediate_size=model.text_encoder.intermediate_size,
                    num_hidden_layers=model.text_encoder.num_hidden_layers,
                    num_attention_heads=model.text_encoder.num_attention_heads,
                )
            ),
        }
    return {
        part: {name: tuple(p.shape) for name, p in network.named_parameters()}
        for part, network in networks.items()
    }


@pytest.mark.parametrize("name", COUNTS)
def test_names_shapes_and_counts(name: str) -> None:
    model = compose([f"model={name}"]).model
    networks = make_networks(model, attention=dot_product_attention, dtype="float32")
    expected = torch_shapes(model)
    for part in COUNTS[name]:
        theirs = expected[part]
        ours = flat(getattr(networks, part).abstract())
        assert sum(math.prod(leaf.shape) for leaf in ours.values()) == COUNTS[name][part]
        empty = {path: np.broadcast_to(np.empty(()), leaf.shape) for path, leaf in ours.items()}
        shapes = {to_torch(path): array_to_torch(path, a).shape for path, a in empty.items()}
        assert shapes == theirs
        assert {from_torch(tensor) for tensor in theirs} == set(ours)


def small() -> Pure:
    """A network with every kind of parameter but embeddings."""
    numerics = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.DEFAULT)
    return pure(
        lambda rngs: ResnetBlock(
            8, 16, time_features=32, num_groups=4, eps=1e-5, numerics=numerics, rngs=rngs
        )
    )


def test_random_start_is_a_function_of_the_key() -> None:
    network = small()
    init = jax.jit(network.init)
    one, again, other = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (one, network.abstract()))
    assert shapes[0] == shapes[1]
    for path, value in flat(one).items():
        np.testing.assert_array_equal(value, flat(again)[path])
        if path[-1] == "kernel":
            assert not np.array_equal(value, flat(other)[path]), path


def test_random_start_does_not_depend_on_the_mesh() -> None:
    network = small()
    mesh = micro_mesh(8, data=2, fsdp=4)
    spec = jax.NamedSharding(mesh, jax.P("fsdp"))
    whole = jax.NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(
        lambda leaf: spec if leaf.shape[0] % 4 == 0 else whole, network.abstract()
    )
    sharded = jax.jit(network.init, out_shardings=shardings)(jax.random.key(0))
    for path, value in flat(jax.jit(network.init)(jax.random.key(0))).items():
        np.testing.assert_array_equal(value, flat(sharded)[path])


def test_random_start_has_torch_s_distribution() -> None:
    numerics = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.DEFAULT)
    ours = pure(lambda rngs: Linear(400, 300, numerics=numerics, rngs=rngs)).init(jax.random.key(0))
    torch.manual_seed(0)
    theirs = torch.nn.Linear(400, 300)
    for value, tensor in [(ours["kernel"], theirs.weight), (ours["bias"], theirs.bias)]:
        expected = tensor.detach().numpy()
        np.testing.assert_allclose(np.std(value), np.std(expected), rtol=0.1)
        np.testing.assert_allclose(np.abs(value).max(), np.abs(expected).max(), rtol=0.02)


def test_parameters_of_a_network_are_independent() -> None:
    """Slices of one draw must not overlap."""
    kernels = [
        np.asarray(value).ravel()
        for path, value in flat(small().init(jax.random.key(0))).items()
        if path[-1] == "kernel"
    ]
    scaled = [np.unique(np.round(k / np.abs(k).max(), 6))[:64] for k in kernels if k.size > 100]
    joined = np.concatenate(scaled)
    assert np.unique(joined).size > 0.95 * joined.size


def test_flat_and_nested_are_inverse() -> None:
    tree: Params = {"a": {"0": {"kernel": 1}, "1": {"kernel": 2}}, "b": 3}
    assert flat(tree) == {("a", "0", "kernel"): 1, ("a", "1", "kernel"): 2, ("b",): 3}
    assert nested(flat(tree)) == tree


def test_apply_refuses_what_is_missing() -> None:
    class One(nnx.Module):
        def __init__(self) -> None:
            numerics = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.DEFAULT)
            self.linear = Linear(2, 2, numerics=numerics, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(x)

    with pytest.raises(KeyError):
        pure(lambda rngs: One()).apply({"linear": {"kernel": jnp.ones((2, 2))}}, jnp.ones((1, 2)))
