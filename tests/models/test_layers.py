"""Layers against torch's own, where the whole network could hide a difference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdx.config.schema import AttentionConfig, AttentionKind, Platform
from sdx.models.attention import (
    AttentionFn,
    dot_product_attention,
    per_head_attention,
)
from sdx.models.attention_choice import select_attention
from sdx.models.clip_text import exact_gelu, quick_gelu
from sdx.models.layers import (
    Conv2d,
    GroupNorm,
    LayerNorm,
    Linear,
    Numerics,
    Upsample,
    timestep_embedding,
)
from sdx.models.module import pure

pytestmark = pytest.mark.fast
FLOAT32 = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.HIGHEST)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def as_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_group_norm_where_its_epsilon_matters(eps: float) -> None:
    x = 1e-3 * normal(0, 2, 3, 5, 8) + 4.0
    scale, bias = normal(1, 8), normal(2, 8)
    network = pure(lambda rngs: GroupNorm(4, 8, eps=eps, numerics=FLOAT32))
    ours = network.apply({"scale": scale, "bias": bias}, x)
    theirs = torch.nn.functional.group_norm(
        as_torch(x).permute(0, 3, 1, 2).double(),
        4,
        as_torch(scale).double(),
        as_torch(bias).double(),
        eps,
    )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-3)


def test_layer_norm() -> None:
    x, scale, bias = normal(0, 2, 5, 8), normal(1, 8), normal(2, 8)
    network = pure(lambda rngs: LayerNorm(8, numerics=FLOAT32))
    ours = network.apply({"scale": scale, "bias": bias}, x)
    theirs = torch.nn.functional.layer_norm(as_torch(x), (8,), as_torch(scale), as_torch(bias))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolution(kernel_size: int) -> None:
    network = pure(lambda rngs: Conv2d(3, 4, kernel_size, numerics=FLOAT32, rngs=rngs))
    params, x = network.init(jax.random.key(0)), normal(0, 2, 5, 6, 3)
    theirs = torch.nn.functional.conv2d(
        as_torch(x).permute(0, 3, 1, 2),
        as_torch(params["kernel"]).permute(3, 2, 0, 1),
        as_torch(params["bias"]),
        padding=kernel_size // 2,
    )
    ours = network.apply(params, x)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(("flip_sin_to_cos", "freq_shift"), [(True, 0), (False, 1)])
def test_timestep_embedding(flip_sin_to_cos: bool, freq_shift: int) -> None:
    timesteps = jnp.array([0, 1, 500, 999])
    ours = timestep_embedding(timesteps, 32, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)
    k = np.arange(16)
    angles = np.array([[0], [1], [500], [999]]) * 10000.0 ** (-k / (16 - freq_shift))[None]
    waves = (
        [np.cos(angles), np.sin(angles)] if flip_sin_to_cos else [np.sin(angles), np.cos(angles)]
    )
    np.testing.assert_allclose(ours, np.concatenate(waves, -1), atol=1e-4)
    assert ours.dtype == jnp.float32


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(is_causal: bool) -> None:
    query, key, value = (normal(seed, 2, 6, 3, 4) for seed in range(3))
    ours = dot_product_attention(
        query, key, value, upcast=False, precision=FLOAT32.precision, is_causal=is_causal
    )
    q, k, v = (as_torch(x).transpose(1, 2) for x in (query, key, value))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("length", [6, 512])  # below and above where heads are computed alone
def test_per_head_attention_and_its_gradients(length: int) -> None:
    operands = [normal(seed, 2, length, 2, 4) for seed in range(3)]

    def outcome(attention: AttentionFn) -> list[jax.Array]:
        def run(*args: jax.Array) -> jax.Array:
            return attention(*args, upcast=False, precision=FLOAT32.precision)

        y, pull_back = jax.vjp(run, *operands)
        return [y, *pull_back(normal(3, *y.shape))]

    for ours, plain in zip(
        outcome(per_head_attention), outcome(dot_product_attention), strict=True
    ):
        np.testing.assert_allclose(ours, plain, atol=2e-6, rtol=1e-5)


def test_convolution_of_an_enlarged_image_and_its_gradients() -> None:
    network = pure(lambda rngs: Upsample(5, numerics=FLOAT32, rngs=rngs))
    params, x = network.init(jax.random.key(0)), normal(0, 2, 3, 4, 5)
    y, pull_back = jax.vjp(lambda p, x: network.apply(p, x, (6, 8)), params, x)
    cotangent = normal(1, *y.shape)
    leaf = as_torch(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    kernel = as_torch(params["conv"]["kernel"]).permute(3, 2, 0, 1).contiguous().requires_grad_()
    enlarged = torch.nn.functional.interpolate(leaf, scale_factor=2.0, mode="nearest")
    bias = as_torch(params["conv"]["bias"])
    theirs = torch.nn.functional.conv2d(enlarged, kernel, bias, padding=1)
    theirs.backward(as_torch(cotangent).permute(0, 3, 1, 2))
    assert leaf.grad is not None and kernel.grad is not None
    to_params, to_x = pull_back(cotangent)
    np.testing.assert_allclose(y, theirs.detach().permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(to_x, leaf.grad.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(
        to_params["conv"]["kernel"], kernel.grad.permute(2, 3, 1, 0), atol=1e-4
    )


def test_product_and_its_gradients() -> None:
    network = pure(lambda rngs: Linear(5, 7, numerics=FLOAT32, rngs=rngs))
    params, x, cotangent = network.init(jax.random.key(0)), normal(0, 2, 3, 5), normal(1, 2, 3, 7)
    y, pull_back = jax.vjp(network.apply, params, x)
    plain, pull_plain = jax.vjp(lambda p, x: x @ p["kernel"] + p["bias"][None, None], params, x)
    np.testing.assert_allclose(y, plain, atol=1e-6)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-5), pull_back(cotangent), pull_plain(cotangent)
    )


def test_activations() -> None:
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(exact_gelu(x), torch.nn.functional.gelu(as_torch(x)), atol=1e-6)
    sigmoid = 1 / (1 + np.exp(-1.702 * np.asarray(x)))
    np.testing.assert_allclose(quick_gelu(x), np.asarray(x) * sigmoid, atol=1e-6)


@pytest.mark.parametrize("platform", Platform)
@pytest.mark.parametrize("kind", AttentionKind)
def test_every_attention_kind_has_a_function(kind: AttentionKind, platform: Platform) -> None:
    config = AttentionConfig(kind=kind)
    assert callable(select_attention(config, platform, dtype="bfloat16"))
