"""Trains the small autoencoder of the embedded model on `data=shapes`.

The decoder learns from latents with extra noise on them, so that a UNet which leaves a little noise
still gets pure colours and straight edges. At the end latents are standardised inside the 1x1
convolutions around them, so the scaling factor is 1.
"""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from sdx.config.schema import VAEConfig
from sdx.data.shapes import ShapesSource
from sdx.models.attention import dot_product_attention
from sdx.models.module import Params, Pure, pure
from sdx.models.vae import AutoencoderKL

BATCH_SIZE = 8
CROPPED_STEPS = 0.88
"""Share of the steps, the first ones, on quarters of pictures, which cost a quarter."""
LEARNING_RATE = 2e-3
KL_WEIGHT = 5e-4
"""Of the mean over latent elements, against a mean over pixels."""
LEAST_CONTRAST = 0.4
"""Errors count relative to a picture's contrast down to this: pale shapes get outlines too."""
CONSTANT = 2.0
"""What the constant channel of the initial parameters holds; it outweighs colours in the norms."""
INITIAL_LOGVAR = -6.0
"""So little noise on latents that the first steps see the colours."""
LATENT_NOISE = 0.2
"""Largest standard deviation of the extra noise the decoder learns to see through."""
NUM_STATISTICS = 1024
"""Images that the mean and deviation of latents are measured on."""


def make_network(config: VAEConfig) -> Pure:
    """The autoencoder in float32."""
    return pure(
        lambda rngs: AutoencoderKL(
            config,
            attention=dot_product_attention,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            precision=jax.lax.Precision.DEFAULT,
            rngs=rngs,
        )
    )


def train_vae(
    config: VAEConfig, resolution: int, *, num_steps: int, seed: int, say: Callable[[str], None]
) -> Params:
    """Parameters of an autoencoder of shapes; each latent channel has mean 0 and deviation 1."""
    network = make_network(config)
    root = jax.random.key(seed)
    params = _start_as_pooling(config, jax.jit(network.init)(jax.random.fold_in(root, num_steps)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, num_steps // 20, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(
        params: Params, opt_state: optax.OptState, images: Array, progress: Array, key: Array
    ) -> tuple[Params, optax.OptState, Array]:
        gradients, errors = jax.grad(_loss, argnums=1, has_aux=True)(
            network, params, images, progress, key
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, errors

    begin = time.monotonic()
    for i, images in enumerate(_batches(resolution, num_steps, BATCH_SIZE)):
        if i < CROPPED_STEPS * num_steps:
            images = _crop(images, resolution // 2, np.random.default_rng((seed, i)))
        params, opt_state, errors = step(
            params, opt_state, images, np.float32(i / num_steps), jax.random.fold_in(root, i)
        )
        if i % 100 == 99 or i == num_steps - 1:
            error, kl, deviation = np.asarray(errors)
            say(
                f"vae {i + 1}/{num_steps}: error {error:.4f}, KL {kl:.3f}, posterior deviation "
                f"{deviation:.3f}, {time.monotonic() - begin:.0f} s"
            )
    return _standardise(network, params, resolution)


def reconstruction_error(
    config: VAEConfig, params: Params, resolution: int, *, num_images: int = 256
) -> float:
    """Mean absolute error of held-out pictures encoded and decoded, in grey levels of 255."""
    network = make_network(config)

    @jax.jit
    def reconstruct(images: Array) -> Array:
        mean = jnp.split(network.apply(params, to_signed(images), method="encode"), 2, axis=-1)[0]
        return network.apply(params, mean, method="decode")

    source = ShapesSource(num_images, resolution, "validation")
    images = np.stack([source[i].pixels for i in range(num_images)])
    decoded = np.concatenate([reconstruct(part) for part in np.split(images, num_images // 64)])
    return float(np.abs(np.clip(127.5 * decoded + 127.5, 0, 255) - images).mean())


def to_signed(images: UInt8[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    """Images in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def _loss(
    network: Pure, params: Params, images: Array, progress: Array, key: Array
) -> tuple[Array, Array]:
    """Error of pixels, edges and coarse averages, and a light pull of the latents to N(0, 1)."""
    images = to_signed(images)
    mean, logvar = jnp.split(network.apply(params, images, method="encode"), 2, axis=-1)
    logvar = jnp.clip(logvar, -20.0, 10.0)
    extra_key, noise_key = jax.random.split(key)
    extra = LATENT_NOISE * progress * jax.lax.stop_gradient(jnp.std(mean))
    extra = extra * jax.random.uniform(extra_key, (images.shape[0], 1, 1, 1))
    deviation = jnp.sqrt(jnp.exp(logvar) + jnp.square(extra))
    latents = mean + deviation * jax.random.normal(noise_key, mean.shape)
    contrast = jnp.mean(jnp.max(images, (1, 2)) - jnp.min(images, (1, 2)), -1)
    errors = network.apply(params, latents, method="decode") - images
    errors = errors / jnp.maximum(contrast, LEAST_CONTRAST)[:, None, None, None]
    b, h, w, c = errors.shape
    coarse = jnp.mean(errors.reshape(b, h // 8, 8, w // 8, 8, c), axis=(2, 4))
    error = jnp.mean(jnp.abs(errors))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    edges = jnp.mean(jnp.abs(jnp.diff(errors, axis=1))) + jnp.mean(
        jnp.abs(jnp.diff(errors, axis=2))
    )
    loss = error + edges + jnp.mean(jnp.square(errors)) + jnp.mean(jnp.abs(coarse)) + KL_WEIGHT * kl
    return loss, jnp.stack([error, kl, jnp.mean(jnp.exp(0.5 * logvar))])


def _start_as_pooling(config: VAEConfig, params: Params) -> Params:
    """Initial parameters that encode by averaging squares and decode by repeating pixels.

    Training then only has to learn outlines. Red, green, blue and a constant travel in the first
    four channels of every layer and negated in the next four, because silu(x) - silu(-x) = x; the
    constant keeps the brightness that the norms divide out. Residual branches start at zero.
    """
    params = jax.tree.map(np.array, params)
    colours = np.concatenate([np.eye(3, 4), -np.eye(3, 4)], axis=1)
    paired = np.concatenate([np.eye(4), -np.eye(4)], axis=1)
    both = np.eye(8)
    encoder, decoder = params["encoder"], params["decoder"]
    for half in (encoder, decoder):
        for level in (half["mid_block"], *half.get("down_blocks", half.get("up_blocks")).values()):
            for resnet in level["resnets"].values():
                resnet["conv2"] = jax.tree.map(np.zeros_like, resnet["conv2"])
                if "conv_shortcut" in resnet:
                    _carry(resnet["conv_shortcut"], both)
            for attention in level.get("attentions", {}).values():
                attention["to_out"] = jax.tree.map(np.zeros_like, attention["to_out"])
    _carry(encoder["conv_in"], colours)
    encoder["conv_in"]["bias"][[3, 7]] = CONSTANT, -CONSTANT
    for level in encoder["down_blocks"].values():
        if "downsamplers" in level:
            _carry(level["downsamplers"]["0"]["conv"], both, is_pooling=True)
    _carry(encoder["conv_out"], np.pad(0.5 * paired.T, ((0, 0), (0, 4))))
    _carry(params["quant_conv"], np.pad(np.eye(4), ((0, 4), (0, 4))))
    params["quant_conv"]["bias"][4:] = INITIAL_LOGVAR
    _carry(params["post_quant_conv"], np.eye(4))
    _carry(decoder["conv_in"], paired)
    for level in decoder["up_blocks"].values():
        if "upsamplers" in level:
            _carry(level["upsamplers"]["0"]["conv"], both)
    _carry(decoder["conv_out"], 0.5 * CONSTANT * colours.T)
    return jax.tree.map(jnp.asarray, params)


def _carry(conv: Params, matrix: np.ndarray, *, is_pooling: bool = False) -> None:
    """Makes `conv` apply `matrix` (in, out) to its first channels: at one pixel, or 2x2."""
    kernel = conv["kernel"]
    inputs, outputs = matrix.shape
    conv["bias"][:outputs] = 0
    kernel[..., :outputs] = 0
    if is_pooling:
        kernel[:2, :2, :inputs, :outputs] = matrix / 4
    else:
        kernel[kernel.shape[0] // 2, kernel.shape[1] // 2, :inputs, :outputs] = matrix


def _standardise(network: Pure, params: Params, resolution: int) -> Params:
    """The same autoencoder with latents of mean 0 and deviation 1 per channel over the data."""
    encode = jax.jit(lambda images: network.apply(params, to_signed(images), method="encode"))
    batches = _batches(resolution, NUM_STATISTICS // 64, 64)
    moments = np.concatenate([np.asarray(encode(images)) for images in batches])
    means = np.split(moments, 2, axis=-1)[0]
    center, scale = means.mean((0, 1, 2)), means.std((0, 1, 2))
    quant, post = params["quant_conv"], params["post_quant_conv"]
    divisor = np.concatenate([scale, np.ones_like(scale)])
    shift = np.concatenate([-center / scale, -2 * np.log(scale)])
    return params | {
        "quant_conv": {
            "kernel": quant["kernel"] / divisor,
            "bias": quant["bias"] / divisor + shift,
        },
        "post_quant_conv": {
            "kernel": post["kernel"] * scale[None, None, :, None],
            "bias": post["bias"] + center @ post["kernel"][0, 0],
        },
    }


def _crop(
    images: UInt8[np.ndarray, "b H W 3"], side: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "b {side} {side} 3"]:
    """A square of `side` pixels of each image: of two at random places the one with more to see."""
    squares = []
    for image in images:
        corners = rng.integers(len(image) - side + 1, size=(2, 2))
        squares.append(max((image[y : y + side, x : x + side] for y, x in corners), key=np.std))
    return np.stack(squares)


def _batches(
    resolution: int, num_batches: int, batch_size: int
) -> Iterator[UInt8[np.ndarray, "b H W 3"]]:
    source = ShapesSource(num_batches * batch_size, resolution)
    for i in range(num_batches):
        yield np.stack([source[i * batch_size + j].pixels for j in range(batch_size)])
