"""The thin layers of every network here: convolution, product, norms, embeddings, resampling.

Layout is NHWC, convolution kernels are HWIO, linear kernels are (in, out). Parameters are kept in
`Numerics.param_dtype` and cast to `Numerics.dtype` where they are used; statistics of norms and
the timestep embedding are float32. Initial values are torch's defaults, because a UNet trained
from random should start where its peer starts: uniform within 1 / sqrt(fan_in) for kernels and
biases (torch/nn/modules/linear.py and conv.py, `reset_parameters`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.random import threefry2x32_p
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

# One pixel on every side: what all 3x3 convolutions have, save the VAE encoder's strided ones.
SAME = ((1, 1), (1, 1))
# Base of the sinusoids (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).
MAX_PERIOD = 10_000.0
LAWS = ("uniform", "normal", "constant")  # in [-1, 1); N(0, 1); 1


@runtime_checkable  # beartype checks arguments against it in tests
class PlaceFn(Protocol):
    """`x` as it is, with its last dim split over the devices that share the width of a layer."""

    def __call__(self, x: Array) -> Array: ...


@dataclass(frozen=True)
class Numerics:
    """How a network computes: types of activations and stored parameters, precision of products."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    precision: jax.lax.Precision
    over_width: PlaceFn | None = None
    """Handed in where devices share the width of layers; a network knows no mesh."""


@dataclass(frozen=True)
class Initial:
    """The distribution a parameter starts from: `spread` times a draw of `law`."""

    law: Literal["uniform", "normal", "constant"]
    spread: float


class Linear(nnx.Module):
    """A product with a kernel (in, out), plus bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        self.kernel = _uniform(shape, in_features, numerics, rngs)
        self.bias = _uniform(shape[1:], in_features, numerics, rngs) if use_bias else None
        self.numerics = numerics

    @jax.named_scope("product")
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        dtype = self.numerics.dtype
        y = _product(x.astype(dtype), self.kernel[...].astype(dtype), self.numerics.precision)
        return y if self.bias is None else y + _across(self.bias[...].astype(dtype), y)

    def halves(self, x: Float[Array, "*batch i"]) -> tuple[Array, Array]:
        """The outcome's first and second half.

        Where devices share its width, each has a part of one half: then it is the kernel, cut
        before the product, whose columns they exchange, and not the far larger outcome.
        """
        over_width, dtype = self.numerics.over_width, self.numerics.dtype
        if over_width is None:
            first, second = jnp.split(self(x), 2, axis=-1)
            return first, second
        kernel = over_width(self.kernel[...].astype(dtype).reshape(x.shape[-1], 2, -1))
        products = [
            _product(x.astype(dtype), kernel[:, i], self.numerics.precision) for i in (0, 1)
        ]
        if self.bias is not None:
            bias = over_width(self.bias[...].astype(dtype).reshape(2, -1))
            products = [y + _across(bias[i], y) for i, y in enumerate(products)]
        return products[0], products[1]


class Conv2d(nnx.Module):
    """A convolution; 1x1 has no padding, by default the others one pixel on every side."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] = SAME,
        use_bias: bool = True,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ):
        sides = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        fan_in = in_channels * math.prod(sides)
        shape = (*sides, in_channels, out_channels)
        self.kernel = _uniform(shape, fan_in, numerics, rngs)
        self.bias = _uniform(shape[3:], fan_in, numerics, rngs) if use_bias else None
        self.is_product = sides == (1, 1)
        self.stride = stride
        self.padding = padding
        self.numerics = numerics

    @jax.named_scope("convolution")
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        dtype, precision = self.numerics.dtype, self.numerics.precision
        kernel = self.kernel[...].astype(dtype)
        if self.is_product:
            y = _product(x.astype(dtype), kernel[0, 0], precision)
        else:
            y = _convolve(x.astype(dtype), kernel, self.stride, self.padding, precision)
        return y if self.bias is None else y + _across(self.bias[...].astype(dtype), y)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all pixels (Wu & He 2018, arXiv 1803.08494)."""

    def __init__(self, num_groups: int, channels: int, *, eps: float, numerics: Numerics):
        self.scale = _constant(1.0, channels, numerics)
        self.bias = _constant(0.0, channels, numerics)
        self.num_groups = num_groups
        self.eps = eps
        self.dtype = numerics.dtype

    @jax.named_scope("normalisation")
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x.astype(jnp.float32)
        centred = x - self._group_mean(x)
        rate = jax.lax.rsqrt(self._group_mean(jnp.square(centred)) + self.eps)
        scale = rate * _across(self.scale[...].astype(x.dtype), x)
        return (centred * scale + _across(self.bias[...].astype(x.dtype), x)).astype(self.dtype)

    def _group_mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        """The mean of each channel's group over all pixels.

        Pixels first, then the few channels of a group: a sum over both at once has an inner loop
        as long as a group is wide (2 here) and made norm and SiLU 2.6 times slower on CPU.
        """
        b, _, _, c = x.shape
        per_group = jnp.mean(x, (1, 2)).reshape(b, self.num_groups, -1).mean(-1)
        return jnp.repeat(per_group, c // self.num_groups, axis=-1)[:, None, None, :]


class LayerNorm(nnx.Module):
    """Normalises the last dim (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, features: int, *, eps: float = 1e-5, numerics: Numerics):
        self.scale = _constant(1.0, features, numerics)
        self.bias = _constant(0.0, features, numerics)
        self.eps = eps
        self.dtype = numerics.dtype

    @jax.named_scope("normalisation")
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, -1, keepdims=True)
        normal = centred * jax.lax.rsqrt(
            jnp.mean(jnp.square(centred), -1, keepdims=True) + self.eps
        )
        scale, bias = (_across(p[...].astype(x.dtype), x) for p in (self.scale, self.bias))
        return (normal * scale + bias).astype(self.dtype)


class Embedding(nnx.Module):
    """A table of vectors, drawn from N(0, 0.02) as transformers' CLIP draws them."""

    def __init__(self, num_embeddings: int, features: int, *, numerics: Numerics, rngs: nnx.Rngs):
        initial = Initial("normal", 0.02)
        self.embedding = _parameter(initial, (num_embeddings, features), numerics)
        self.dtype = numerics.dtype

    def __call__(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        return jnp.take(self.embedding[...], indices, axis=0).astype(self.dtype)


class Upsample(nnx.Module):
    """Nearest-neighbour enlargement to a given size, then a convolution."""

    def __init__(self, channels: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.conv = Conv2d(channels, channels, numerics=numerics, rngs=rngs)

    @jax.named_scope("convolution")
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int]
    ) -> Float[Array, "b h2 w2 c"]:
        if size != (2 * x.shape[1], 2 * x.shape[2]):
            return self.conv(_nearest(x, size))
        assert self.conv.bias is not None
        dtype, precision = self.conv.numerics.dtype, self.conv.numerics.precision
        y = _convolve_doubled(x.astype(dtype), self.conv.kernel[...].astype(dtype), precision)
        return y + _across(self.conv.bias[...].astype(dtype), y)


class Downsample(nnx.Module):
    """A convolution of stride 2; the UNet pads every side, the VAE encoder only two."""

    def __init__(
        self,
        channels: int,
        *,
        padding: tuple[tuple[int, int], tuple[int, int]],
        numerics: Numerics,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv2d(
            channels, channels, stride=2, padding=padding, numerics=numerics, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class ResnetBlock(nnx.Module):
    """Two convolutions around a timestep shift, plus a shortcut (diffusers `ResnetBlock2D`).

    The VAE has no timestep: `time_features=None`, and `time` is not given.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_features: int | None,
        num_groups: int,
        eps: float,
        numerics: Numerics,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"numerics": numerics, "rngs": rngs}
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps, numerics=numerics)
        self.conv1 = Conv2d(in_channels, out_channels, **common)
        self.time_emb_proj = (
            None if time_features is None else Linear(time_features, out_channels, **common)
        )
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps, numerics=numerics)
        self.conv2 = Conv2d(out_channels, out_channels, **common)
        self.conv_shortcut = (
            None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1, **common)
        )

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w o"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert time is not None
            hidden = hidden + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def timestep_embedding(
    timesteps: Real[Array, " b"], features: int, *, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "b {features}"]:
    """Sinusoids of the timesteps, float32; cosines come first with `flip_sin_to_cos`.

    Ho et al. 2020 (arXiv 2006.11239), as diffusers `get_timestep_embedding`; `features` is even.
    """
    half = features // 2
    exponents = -math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponents)[None, :]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


def contract(
    left: Array, right: Array, left_dim: int, right_dim: int, precision: jax.lax.Precision
) -> Array:
    """The product of two matrices over one dim of each."""
    dims = (((left_dim,), (right_dim,)), ((), ()))
    return jax.lax.dot_general(left, right, dims, precision=precision)


def draw(law: str, key: Array | None, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """One float32 draw of an `Initial.law`; a constant needs no key."""
    if law == "constant":
        return jnp.ones(shape)
    assert key is not None
    if law == "uniform":
        return jax.random.uniform(key, shape, minval=-1.0)
    return jax.random.normal(key, shape)


def draw_parts(
    law: str, key: Array | None, starts: Sequence[int], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """Numbers of `draw`, for each part those from its start on, the same as in a draw of all.

    Each is a function of the key and its place, so that devices that share an array compute their
    own part, where a slice of a whole draw would be drawn whole by each. (JAX's partitionable
    Threefry, and its way from bits to numbers: jax/_src/prng.py, random.py.)
    """
    whole = (len(starts), *shape)
    if law == "constant":
        return jnp.ones(whole)
    assert key is not None
    place = jnp.asarray(starts, jnp.uint32).reshape(-1, *(1 for _ in shape))
    place = jnp.broadcast_to(place, whole)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]))
        place += stride * jax.lax.broadcasted_iota(jnp.uint32, whole, dim + 1)
    words = jax.random.key_data(key)
    high, low = threefry2x32_p.bind(words[0], words[1], jnp.zeros_like(place), place)
    mantissa = jax.lax.shift_right_logical(high ^ low, jnp.uint32(9)) | jnp.uint32(0x3F800000)
    number = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0  # in [0, 1)
    least = np.float32(-1) if law == "uniform" else np.nextafter(np.float32(-1), np.float32(0))
    number = jnp.maximum(least, number * (np.float32(1) - least) + least)
    return number if law == "uniform" else np.float32(math.sqrt(2)) * jax.lax.erf_inv(number)


def _product_value(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], precision: jax.lax.Precision
) -> Float[Array, "*batch o"]:
    """`x @ kernel` as a product of two matrices, backwards as well.

    Left to autodiff, XLA:CPU copies the cotangent into a transposed layout (and computes what it
    fused into that copy column by column) before the kernel's gradient: 17 against 6 ms of CPU
    for 4096 x 64 @ 64 x 512, forward and backward.
    """
    rows = x.reshape(-1, x.shape[-1])
    return contract(rows, kernel, 1, 0, precision).reshape(*x.shape[:-1], kernel.shape[1])


def _product_forward(
    x: Array, kernel: Array, precision: jax.lax.Precision
) -> tuple[Array, tuple[Array, Array]]:
    # Not through `_product`: what recomputes all but products must see that this is one.
    return _product_value(x, kernel, precision), (x, kernel)


def _product_backward(
    precision: jax.lax.Precision, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = operands
    rows, cotangents = (y.reshape(-1, y.shape[-1]) for y in (x, cotangent))
    to_x = contract(cotangents, kernel, 1, 1, precision).reshape(x.shape)
    if x.shape[-1] <= cotangent.shape[-1]:
        return to_x, contract(rows, cotangents, 0, 0, precision)
    # The wider operand goes right, half the time for 4096 x 256; the barrier keeps it there.
    return to_x, jax.lax.optimization_barrier(contract(cotangents, rows, 0, 0, precision)).T


_product = jax.custom_vjp(_product_value, nondiff_argnums=(2,))
_product.defvjp(_product_forward, _product_backward)


def _across(per_channel: Array, x: Array) -> Array:
    """`per_channel` with as many dims as `x`: rank promotion is refused in the tests."""
    return per_channel.reshape((1,) * (x.ndim - 1) + per_channel.shape)


def _nearest(x: Array, size: tuple[int, int]) -> Array:
    h, w = x.shape[1:3]
    rows, columns = (jnp.arange(new) * old // new for new, old in zip(size, (h, w), strict=True))
    return x[:, rows][:, :, columns]


def _convolve(
    x: Array,
    kernel: Array,
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]],
    precision: jax.lax.Precision,
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _convolve_doubled_value(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], precision: jax.lax.Precision
) -> Float[Array, "b h2 w2 o"]:
    """A 3x3 convolution of `x` enlarged to twice its sides; `_by_phases` where that is faster.

    The choice is made where the program is lowered, so a step compiled here for a TPU is the TPU's.
    Its own backward, because autodiff would keep what either branch needs.
    """
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(_by_phases, precision), default=partial(_enlarged, precision)
    )


def _convolve_doubled_forward(
    x: Array, kernel: Array, precision: jax.lax.Precision
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_doubled(x, kernel, precision), (x, kernel)


def _convolve_doubled_backward(
    precision: jax.lax.Precision, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    def pull_back(convolve: Any) -> Any:
        return lambda *args: jax.vjp(partial(convolve, precision), *args[:2])[1](args[2])

    return jax.lax.platform_dependent(
        *operands, cotangent, cpu=pull_back(_by_phases), default=pull_back(_enlarged)
    )


_convolve_doubled = jax.custom_vjp(_convolve_doubled_value, nondiff_argnums=(2,))
_convolve_doubled.defvjp(_convolve_doubled_forward, _convolve_doubled_backward)


def _enlarged(precision: jax.lax.Precision, x: Array, kernel: Array) -> Array:
    b, h, w, c = x.shape
    doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return _convolve(doubled.reshape(b, 2 * h, 2 * w, c), kernel, 1, SAME, precision)


def _by_phases(precision: jax.lax.Precision, x: Array, kernel: Array) -> Array:
    """Each of the four pixels that one becomes sees two rows and two columns of `x`, through sums
    of the kernel's: 4/9 of the work. 16 against 42 ms of CPU for 16x16x128, forward and backward.
    """
    b, h, w, _ = x.shape
    pixels = [
        _convolve(x, part.swapaxes(0, 1), 1, ((1 - row, row), (1 - column, column)), precision)
        for row, rows in enumerate(_phases(kernel))
        for column, part in enumerate(_phases(rows.swapaxes(0, 1)))
    ]
    grid = jnp.stack(pixels, axis=3).reshape(b, h, w, 2, 2, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, -1)


def _phases(kernel: Array) -> tuple[Array, Array]:
    """Rows of a kernel that meet equal rows of the enlarged image, summed: the upper pixel's and
    the lower pixel's."""
    upper, middle, lower = kernel
    return jnp.stack([upper, middle + lower]), jnp.stack([upper + middle, lower])


def _uniform(
    shape: tuple[int, ...], fan_in: int, numerics: Numerics, rngs: nnx.Rngs
) -> nnx.Param[Array]:
    return _parameter(Initial("uniform", 1.0 / math.sqrt(fan_in)), shape, numerics)


def _constant(value: float, features: int, numerics: Numerics) -> nnx.Param[Array]:
    return _parameter(Initial("constant", value), (features,), numerics)


def _parameter(initial: Initial, shape: tuple[int, ...], numerics: Numerics) -> nnx.Param[Array]:
    """A parameter of zeros that knows what `module.Pure.init` draws it from; drawing each here as
    well would cost every start a second of tracing."""
    return nnx.Param(jnp.zeros(shape, numerics.param_dtype), initial=initial)
