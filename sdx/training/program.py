"""The seam between a configuration and what runs: two jitted programs, `encode` and `step`, over
one mesh.

The same `build` serves real devices (train), described ones with abstract arrays (plan) and virtual
CPU devices (tests). Frozen weights are arguments of `encode`, so neither program holds them as
constants, and a step does not know whether its moments were just encoded or come from a cache.
A text encoder that is trained is part of the step, and what `encode` hands over for it is the
tokens; a frozen one is not even an argument there, so that nothing can differentiate it.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered, Wrapped
from jaxtyping import Array, Float, Float16, Float32, Int, Int32, Shaped, UInt8
from optax import GradientTransformation

from sdx.config import resolve
from sdx.config.schema import Cache, Config
from sdx.data.loader import HostBatch
from sdx.diffusion.objective import make_objective
from sdx.models import flops
from sdx.models.attention import AttentionFn
from sdx.models.attention_choice import select_attention
from sdx.models.networks import Networks, make_networks
from sdx.parallel import sharding
from sdx.training.optimizer import make_lr_schedule, make_optimizer, scaled
from sdx.training.state import Params, TrainState, initial_state
from sdx.training.step import Prediction, StepRule, train_step

# Of the root key, where steps take their own numbers.
INIT_STREAMS = {"unet": 2**32 - 1, "text_encoder": 2**32 - 2}
RULES = {"unet": sharding.UNET_RULES, "text_encoder": sharding.TEXT_ENCODER_RULES}

Metrics = dict[str, Float[Array, ""]]


class BatchError(ValueError):
    """The global batch cannot be split over the devices and micro-steps."""


class Batch(NamedTuple):
    """One global batch on the mesh; weights are 1 for good examples, 0 for unreadable ones.

    It has `images`, or `moments` where they come from a cache, which may hold `context` too.
    """

    images: UInt8[Array, "b H W 3"] | None
    tokens: Int32[Array, "b s"]
    weights: Float32[Array, " b"]
    moments: Float16[Array, "b h w m"] | None = None
    context: Float16[Array, "b s d"] | None = None


Shapes = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class ByShape:
    """A function with executables for the shapes of arguments known beforehand; its first argument,
    weights or state, has always the same.
    """

    function: Wrapped
    compiled: Mapping[Shapes, Compiled]

    def __call__(self, weights: Any, *arguments: Batch | Array) -> Any:
        """What the function says, compiled for these shapes already or now."""
        return self.compiled.get(_shapes(arguments), self.function)(weights, *arguments)

    def knowing(self, weights: Any, *arguments: Any) -> "ByShape":
        """This function, compiled for these shapes too; arguments may be abstract."""
        if _shapes(arguments) in self.compiled:
            return self
        compiled = self.function.lower(weights, *arguments).compile()
        return ByShape(self.function, {**self.compiled, _shapes(arguments): compiled})


def _shapes(arguments: Sequence[Any]) -> Shapes:
    arrays = [
        array
        for argument in arguments
        for array in (argument if isinstance(argument, Batch) else (argument,))
    ]
    return tuple(None if array is None else array.shape for array in arrays)


@dataclass(frozen=True)
class Program:
    """What `build` makes; `compile` returns the same program with both functions compiled."""

    mesh: Mesh
    rule: StepRule
    networks: Networks
    global_batch_size: int
    flops_per_step: float
    """Floating-point operations of the model in one update, forward and backward, recomputation not
    counted."""
    abstract_state: TrainState
    """Shapes, types and shardings; what a checkpoint is restored into."""
    abstract_frozen: Params
    abstract_batches: tuple[Batch, ...]
    """What training reads, pixels, or what `data.cache` says: one batch, or one of each bucket."""
    encode: Wrapped | ByShape
    """(frozen, batch) to VAE moments and what the step makes of the captions: text states, or the
    tokens where the text encoder is trained. A batch of another kind or shape than
    `abstract_batches` is compiled when it comes."""
    step: Wrapped | ByShape
    """(state, moments, conditioning, weights) to the next state and metrics; the state handed in is
    used up."""
    compile_s: float | None = None
    """Seconds `compile` took, reading a cached executable included; None before."""

    @property
    def abstract_batch(self) -> Batch:
        """The first of `abstract_batches`."""
        return self.abstract_batches[0]

    @property
    def state_shardings(self) -> TrainState:
        """Where each array of the state lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init(self, **weights: Params) -> TrainState:
        """The state before the first step; a trained network that is not given starts at random."""
        place = self.state_shardings.params
        assert weights.keys() <= place.keys(), f"{[*weights]} given, {[*place]} trained"
        params = {
            name: weights.get(name) or self._random(name, where) for name, where in place.items()
        }
        make = partial(
            initial_state, optimizer=self.rule.optimizer, ema=self.abstract_state.ema is not None
        )
        return jax.jit(make, out_shardings=self.state_shardings)(params)

    def _random(self, name: str, place: Any) -> Params:
        key = jax.random.fold_in(jax.random.key(self.rule.seed), INIT_STREAMS[name])
        draw = partial(getattr(self.networks, name).init, in_parts=self.mesh.size > 1)
        return jax.jit(draw, out_shardings=place)(key)

    def place_frozen(self, **weights: Params) -> Params:
        """The frozen networks' weights where `encode` wants them."""
        return jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), weights, self.abstract_frozen
        )

    @cached_property
    def host_rows(self) -> Sequence[int]:
        """The rows of the global batch that lie on this process's devices, ascending.

        Where the devices of a process lie in the mesh is the topology's affair: the rows need not
        be neighbours, and processes that share a model over `tensor` hold the same ones.
        """
        place = sharding.batch_sharding(self.mesh)
        parts = place.addressable_devices_indices_map((self.global_batch_size,)).values()
        spans = [range(self.global_batch_size)[part[0]] for part in parts if part is not None]
        return sorted({row for span in spans for row in span})

    def place_rows(self, rows: Shaped[np.ndarray, "..."]) -> Shaped[Array, "..."]:
        """The global array of which each process gives its `host_rows`, first dim over the mesh."""
        shape = (self.global_batch_size, *rows.shape[1:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self.global_batch_size)
            first = bisect_left(self.host_rows, start)
            return rows[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding.batch_sharding(self.mesh), part)

    def place_batch(self, host: HostBatch) -> Batch:
        """The global batch of which these are this host's rows."""
        return Batch(
            images=None if host.images is None else self.place_rows(host.images),
            tokens=self.place_rows(host.tokens),
            weights=self.place_rows(host.weights),
            moments=None if host.moments is None else self.place_rows(host.moments),
            context=None if host.context is None else self.place_rows(host.context),
        )

    def lower(self, platforms: tuple[str, ...] | None = None) -> tuple[Lowered, Lowered]:
        """Both programs, traced and lowered for the shapes of this configuration: encode, step;
        for JAX's `platforms` instead of the mesh's, if given."""
        return self._lower(self.abstract_batch, platforms)

    def _lower(
        self, batch: Batch, platforms: tuple[str, ...] | None = None
    ) -> tuple[Lowered, Lowered]:
        assert isinstance(self.encode, Wrapped) and isinstance(self.step, Wrapped), (
            "compiled before"
        )
        encode = self.encode.trace(self.abstract_frozen, batch).lower(lowering_platforms=platforms)
        step = self.step.trace(self.abstract_state, *self._encoded(encode), batch.weights)
        return encode, step.lower(lowering_platforms=platforms)

    def _encoded(self, encode: Lowered) -> list[jax.ShapeDtypeStruct]:
        place = sharding.batch_sharding(self.mesh)
        return [
            jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=place) for out in encode.out_info
        ]

    def compile(self) -> "Program":
        """This program with both functions compiled ahead of their first call, for each bucket."""
        start = time.perf_counter()
        assert isinstance(self.encode, Wrapped) and isinstance(self.step, Wrapped)
        encodes: dict[Shapes, Compiled] = {}
        steps: dict[Shapes, Compiled] = {}
        for batch in self.abstract_batches:
            encode, step = self._lower(batch)
            encodes[_shapes([batch])] = encode.compile()
            steps[_shapes([*self._encoded(encode), batch.weights])] = step.compile()
        return replace(
            self,
            encode=ByShape(self.encode, encodes),
            step=ByShape(self.step, steps),
            compile_s=time.perf_counter() - start,
        )


def build(
    config: Config,
    mesh: Mesh,
    *,
    max_steps: int,
    buckets: Mapping[tuple[int, int], float] | None = None,
) -> Program:
    """The program of `config` on `mesh`; `max_steps` is where a decaying learning rate ends unless
    the config says.

    `buckets` are the shapes, height and width, that images have instead of squares, each with its
    share of the steps; the operations of a step are then the mean over the steps of an epoch.
    Raises BatchError where the batch does not split over the mesh's devices and the micro-steps.
    """
    batch_size = resolve.global_batch_size(config, mesh.size)
    check_batch(config, mesh, batch_size)
    networks = networks_of(config, mesh)
    side = resolve.resolution(config)
    sizes = buckets or {(side, side): 1.0}
    captions = IN_THE_STEP if config.train.text_encoder else BEFORE_THE_STEP
    predict = partial(captions.predict, networks)
    rule = _make_rule(config, mesh, predict, max_steps, batch_size)
    abstract_state, abstract_frozen = abstract_arrays(config, mesh, networks, rule.optimizer)
    batch = sharding.batch_sharding(mesh)
    return Program(
        mesh=mesh,
        rule=rule,
        networks=networks,
        global_batch_size=batch_size,
        flops_per_step=batch_size
        * sum(share * _flops_per_example(config, size) for size, share in sizes.items()),
        abstract_state=abstract_state,
        abstract_frozen=abstract_frozen,
        abstract_batches=tuple(abstract_batch(config, mesh, batch_size, size) for size in sizes),
        encode=jax.jit(partial(captions.encode, networks), out_shardings=batch),
        step=jax.jit(
            partial(train_step, rule),
            donate_argnums=0,
            out_shardings=(
                jax.tree.map(lambda leaf: leaf.sharding, abstract_state),
                sharding.replicated(mesh),
            ),
        ),
    )


def abstract_arrays(
    config: Config, mesh: sharding.AnyMesh, networks: Networks, optimizer: GradientTransformation
) -> tuple[TrainState, Params]:
    """Shapes, types and places of the state and of the frozen networks' parameters; needs no
    devices."""
    trained, frozen = _trained_and_frozen(config, networks)
    start = partial(initial_state, optimizer=optimizer, ema=config.train.ema)
    return placed_arrays(mesh, jax.eval_shape(start, trained), frozen)


def placed_arrays(
    mesh: sharding.AnyMesh, state: TrainState, frozen: Params
) -> tuple[TrainState, Params]:
    """A state and frozen parameters, as shapes, with their places on `mesh`."""
    places = {
        name: sharding.parameter_shardings(params, mesh, RULES[name])
        for name, params in state.params.items()
    }
    return (
        _placed(state, sharding.state_shardings(state, state.params, places, mesh)),
        _placed(frozen, sharding.parameter_shardings(frozen, mesh)),
    )


def networks_of(config: Config, mesh: Mesh) -> Networks:
    """The networks as `config` computes them on `mesh`."""
    return make_networks(
        config.model,
        attention=attention_of(config, mesh),
        dtype=resolve.activations_dtype(config),
        remat=config.train.remat,
        trains_text_encoder=config.train.text_encoder,
        mask_padding_tokens=config.attention.mask_padding_tokens,
        over_width=sharding.over_width(mesh),
    )


def attention_of(config: Config, mesh: Mesh) -> AttentionFn:
    """What computes attention on `mesh`."""
    return select_attention(
        resolve.attention(config),
        resolve.platform(config),
        dtype=resolve.activations_dtype(config),
        mesh=mesh,
    )


def encode(
    networks: Networks, frozen: Params, batch: Batch
) -> tuple[Float[Array, "b h w m"], Float[Array, "b s d"]]:
    """VAE moments and text states, computed or as cached; float32."""
    moments = _moments(networks, frozen, batch)
    if batch.context is not None:
        return moments, batch.context.astype(jnp.float32)
    return moments, text_states(networks, frozen["text_encoder"], batch.tokens)


def predict(
    networks: Networks,
    params: Params,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
    context: Float[Array, "b s d"],
) -> Float[Array, "b h w c"]:
    """The UNet's raw output."""
    return networks.unet.apply(params["unet"], noisy, timesteps, context)


def encode_images(
    networks: Networks, frozen: Params, batch: Batch
) -> tuple[Float[Array, "b h w m"], Int32[Array, "b s"]]:
    """VAE moments, float32, and the tokens as they are."""
    return _moments(networks, frozen, batch), batch.tokens


def predict_from_tokens(
    networks: Networks,
    params: Params,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
    tokens: Int32[Array, "b s"],
) -> Float[Array, "b h w c"]:
    """The UNet's raw output for captions that the text encoder in `params` reads."""
    context = text_states(networks, params["text_encoder"], tokens)
    return predict(networks, params, noisy, timesteps, context)


class Captions(NamedTuple):
    """Which of the two programs reads the captions."""

    encode: Callable[..., tuple[Array, Array]]
    predict: Callable[..., Array]


BEFORE_THE_STEP = Captions(encode, predict)
IN_THE_STEP = Captions(encode_images, predict_from_tokens)


def _moments(networks: Networks, frozen: Params, batch: Batch) -> Float[Array, "b h w m"]:
    """Of images 0 to 255, or as cached."""
    if batch.moments is not None:
        return batch.moments.astype(jnp.float32)
    assert batch.images is not None, "a batch holds images or moments"
    return image_moments(networks, frozen["vae"], batch.images)


def image_moments(
    networks: Networks, vae: Params, images: UInt8[Array, "b H W 3"]
) -> Float[Array, "b h w m"]:
    """VAE moments of images 0 to 255; float32."""
    pixels = images.astype(jnp.float32) / 127.5 - 1
    return networks.vae.apply(vae, pixels, method="encode").astype(jnp.float32)


def text_states(
    networks: Networks, text_encoder: Params, tokens: Int32[Array, "b s"]
) -> Float[Array, "b s d"]:
    """What the text encoder makes of tokens; float32."""
    return networks.text_encoder.apply(text_encoder, tokens).astype(jnp.float32)


def _trained_and_frozen(config: Config, networks: Networks) -> tuple[Params, Params]:
    """Shapes of the parameters, by network."""
    names = ("unet", "text_encoder") if config.train.text_encoder else ("unet",)
    frozen = {name: getattr(networks, name).abstract() for name in ("unet", "vae", "text_encoder")}
    return {name: frozen.pop(name) for name in names}, frozen


def _make_rule(
    config: Config, mesh: Mesh, predict: Prediction, max_steps: int, batch_size: int
) -> StepRule:
    lr = make_lr_schedule(
        config.lr_schedule,
        lr=resolve.learning_rate(config, batch_size),
        warmup_steps=resolve.warmup_steps(config, max_steps),
        decay_steps=resolve.decay_steps(config, max_steps),
    )
    text_encoder_lr = scaled(lr, resolve.text_encoder_share(config))
    rates, by_network = {"lr": lr}, {"unet": lr}
    if config.train.text_encoder:
        rates["lr_text_encoder"] = by_network["text_encoder"] = text_encoder_lr
    return StepRule(
        predict=predict,
        objective=make_objective(config.diffusion, resolve.prediction_type(config)),
        scaling_factor=config.model.vae.scaling_factor,
        optimizer=make_optimizer(config.optimizer, by_network),
        rates=rates,
        max_grad_norm=config.optimizer.max_grad_norm,
        ema_decay=config.train.ema_decay,
        seed=config.run.seed,
        gradient_accumulation=config.train.gradient_accumulation,
        unroll=mesh.devices.flat[0].platform == "cpu",
    )


def abstract_batch(
    config: Config, mesh: sharding.AnyMesh, batch_size: int, size: tuple[int, int]
) -> Batch:
    """Shapes, types and places of one global batch of images of `size`, or of what is cached."""
    length = config.model.text_encoder.max_position_embeddings
    place = sharding.batch_sharding(mesh)

    def rows(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=place)

    batch = Batch(
        images=rows(*size, config.model.vae.in_channels, dtype=jnp.uint8),
        tokens=rows(length, dtype=jnp.int32),
        weights=rows(dtype=jnp.float32),
    )
    if config.data.cache is Cache.none:
        return batch
    latents, channels = _latent_size(config, size), 2 * config.model.vae.latent_channels
    batch = batch._replace(images=None, moments=rows(*latents, channels, dtype=jnp.float16))
    if config.data.cache is Cache.moments:
        return batch
    width = config.model.text_encoder.hidden_size
    return batch._replace(context=rows(length, width, dtype=jnp.float16))


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )


def check_batch(config: Config, mesh: sharding.AnyMesh, batch_size: int) -> None:
    """Raises BatchError where the batch does not split over the devices and micro-steps."""
    shares = sharding.batch_divisor(mesh) * config.train.gradient_accumulation
    if batch_size % shares:
        below = batch_size // shares * shares
        choices = f"{below} or {below + shares}" if below else f"{shares}"
        raise BatchError(
            f"train.global_batch_size={batch_size}: must be a multiple of mesh data x fsdp x "
            f"gradient_accumulation = {shares}; use {choices}."
        )


def _latent_size(config: Config, size: tuple[int, int]) -> tuple[int, int]:
    factor = resolve.vae_factor(config)
    return size[0] // factor, size[1] // factor


def _flops_per_example(config: Config, size: tuple[int, int]) -> float:
    """Forward, and backward at twice that for what is trained; DREAM asks the UNet once more."""
    model, cache = config.model, config.data.cache
    unet = flops.unet_forward_flops(model.unet, *_latent_size(config, size))
    text = flops.text_flops(model.text_encoder)
    encoded = 0.0 if cache is Cache.moments_and_context else text
    return (
        (3 if config.diffusion.dream is None else 4) * unet
        + (3 * text if config.train.text_encoder else encoded)
        + (flops.vae_encode_flops(model.vae, *size) if cache is Cache.none else 0)
    )
