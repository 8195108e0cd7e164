"""The seam between a configuration and what runs: two jitted programs, `encode` and `step`, over
one mesh.

The same `build` serves real devices (train), described ones with abstract arrays (plan) and virtual
CPU devices (tests). Frozen weights are arguments of `encode`, so neither program holds them as
constants, and a step does not know whether its moments were just encoded or come from a cache.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered, Wrapped
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from sdx.config import resolve
from sdx.config.schema import Config
from sdx.diffusion.objective import make_objective
from sdx.models import flops
from sdx.models.attention import select_attention
from sdx.models.networks import Networks, make_networks
from sdx.parallel import sharding
from sdx.training.optimizer import make_lr_schedule, make_optimizer
from sdx.training.state import Params, TrainState, initial_state
from sdx.training.step import StepRule, train_step

INIT_STREAM = 2**32 - 1  # of the root key, where steps take their own numbers

Metrics = dict[str, Float[Array, ""]]


class BatchError(ValueError):
    """The global batch cannot be split over the devices and micro-steps."""


class Batch(NamedTuple):
    """One global batch on the mesh; weights are 1 for good examples, 0 for unreadable ones."""

    images: UInt8[Array, "b H W 3"]
    tokens: Int32[Array, "b s"]
    weights: Float32[Array, " b"]


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
    abstract_batch: Batch
    encode: Wrapped | Compiled
    """(frozen, images, tokens) to VAE moments and text states."""
    step: Wrapped | Compiled
    """(state, moments, context, weights) to the next state and metrics; the state handed in is used
    up."""
    compile_s: float | None = None
    """Seconds `compile` took, reading a cached executable included; None before."""

    @property
    def state_shardings(self) -> TrainState:
        """Where each array of the state lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init(self, unet: Params | None = None) -> TrainState:
        """The state before the first step, from the given UNet weights or from random ones."""
        if unet is None:
            key = jax.random.fold_in(jax.random.key(self.rule.seed), INIT_STREAM)
            place = self.state_shardings.params["unet"]
            unet = jax.jit(self.networks.unet.init, out_shardings=place)(key)
        make = partial(_initial, self.rule, self.abstract_state.ema is not None)
        return jax.jit(make, out_shardings=self.state_shardings)(unet)

    def place_frozen(self, *, vae: Params, text_encoder: Params) -> Params:
        """The frozen weights where `encode` wants them."""
        frozen = {"vae": vae, "text_encoder": text_encoder}
        return jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), frozen, self.abstract_frozen
        )

    def place_batch(
        self,
        images: UInt8[np.ndarray, "b H W 3"],
        tokens: Int32[np.ndarray, "b s"],
        weights: Float32[np.ndarray, " b"],
    ) -> Batch:
        """The global batch of which these are this host's rows."""
        rows = (images, tokens, weights)
        return Batch(
            *(
                jax.make_array_from_process_local_data(like.sharding, x, like.shape)
                for x, like in zip(rows, self.abstract_batch, strict=True)
            )
        )

    def lower(self) -> tuple[Lowered, Lowered]:
        """Both programs, traced and lowered for the shapes of this configuration: encode, step."""
        assert isinstance(self.encode, Wrapped) and isinstance(self.step, Wrapped), (
            "compiled before"
        )
        batch = self.abstract_batch
        encode = self.encode.lower(self.abstract_frozen, batch.images, batch.tokens)
        place = sharding.batch_sharding(self.mesh)
        moments, context = (
            jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=place) for out in encode.out_info
        )
        return encode, self.step.lower(self.abstract_state, moments, context, batch.weights)

    def compile(self) -> "Program":
        """This program with both functions compiled ahead of their first call."""
        start = time.perf_counter()
        encode, step = (lowered.compile() for lowered in self.lower())
        return replace(self, encode=encode, step=step, compile_s=time.perf_counter() - start)


def build(config: Config, mesh: Mesh, *, max_steps: int) -> Program:
    """The program of `config` on `mesh`; `max_steps` is where a decaying learning rate ends unless
    the config says.

    Raises BatchError where the batch does not split over the mesh's devices and the micro-steps.
    """
    batch_size = resolve.global_batch_size(config, mesh.size)
    check_batch(config, mesh, batch_size)
    networks = make_networks(
        config.model,
        attention=select_attention(config.attention.kind, config.hardware.platform),
        dtype=resolve.activations_dtype(config),
        remat=config.train.remat,
    )
    rule = _make_rule(config, mesh, networks, max_steps, batch_size)
    state = jax.eval_shape(partial(_initial, rule, config.train.ema), networks.unet.abstract())
    unet = {"unet": sharding.parameter_shardings(state.params["unet"], mesh, sharding.UNET_RULES)}
    frozen = {
        "vae": networks.vae.abstract(),
        "text_encoder": networks.text_encoder.abstract(),
    }
    abstract_state = _placed(state, sharding.state_shardings(state, state.params, unet, mesh))
    batch = sharding.batch_sharding(mesh)
    return Program(
        mesh=mesh,
        rule=rule,
        networks=networks,
        global_batch_size=batch_size,
        flops_per_step=batch_size * _flops_per_example(config),
        abstract_state=abstract_state,
        abstract_frozen=_placed(frozen, sharding.parameter_shardings(frozen, mesh)),
        abstract_batch=_abstract_batch(config, mesh, batch_size),
        encode=jax.jit(partial(encode, networks), out_shardings=batch),
        step=jax.jit(
            partial(train_step, rule),
            donate_argnums=0,
            out_shardings=(
                jax.tree.map(lambda leaf: leaf.sharding, abstract_state),
                sharding.replicated(mesh),
            ),
        ),
    )


def encode(
    networks: Networks,
    frozen: Params,
    images: UInt8[Array, "b H W 3"],
    tokens: Int32[Array, "b s"],
) -> tuple[Float[Array, "b h w m"], Float[Array, "b s d"]]:
    """VAE moments of images 0 to 255 and text states of tokens; float32."""
    pixels = images.astype(jnp.float32) / 127.5 - 1
    moments = networks.vae.apply(frozen["vae"], pixels, method="encode")
    context = networks.text_encoder.apply(frozen["text_encoder"], tokens)
    return moments.astype(jnp.float32), context.astype(jnp.float32)


def _make_rule(
    config: Config, mesh: Mesh, networks: Networks, max_steps: int, batch_size: int
) -> StepRule:
    lr = make_lr_schedule(
        config.lr_schedule,
        lr=resolve.learning_rate(config, batch_size),
        warmup_steps=resolve.warmup_steps(config, max_steps),
        decay_steps=resolve.decay_steps(config, max_steps),
    )
    return StepRule(
        predict=partial(_predict, networks),
        objective=make_objective(config.diffusion, resolve.prediction_type(config)),
        scaling_factor=config.model.vae.scaling_factor,
        optimizer=make_optimizer(config.optimizer, lr),
        rates={"lr": lr},
        max_grad_norm=config.optimizer.max_grad_norm,
        ema_decay=config.train.ema_decay,
        seed=config.run.seed,
        gradient_accumulation=config.train.gradient_accumulation,
        unroll=mesh.devices.flat[0].platform == "cpu",
    )


def _predict(
    networks: Networks,
    params: Params,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
    context: Float[Array, "b s d"],
) -> Float[Array, "b h w c"]:
    """The UNet's raw output."""
    return networks.unet.apply(params["unet"], noisy, timesteps, context)


def _initial(rule: StepRule, ema: bool, unet: Params) -> TrainState:
    return initial_state({"unet": unet}, rule.optimizer, ema=ema)


def _abstract_batch(config: Config, mesh: Mesh, batch_size: int) -> Batch:
    side, length = resolve.resolution(config), config.model.text_encoder.max_position_embeddings
    place = sharding.batch_sharding(mesh)

    def rows(*shape: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=place)

    return Batch(
        images=rows(side, side, config.model.vae.in_channels, dtype=jnp.uint8),
        tokens=rows(length, dtype=jnp.int32),
        weights=rows(dtype=jnp.float32),
    )


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )


def check_batch(config: Config, mesh: Mesh, batch_size: int) -> None:
    """Raises BatchError where the batch does not split over the devices and micro-steps."""
    shares = sharding.batch_divisor(mesh) * config.train.gradient_accumulation
    if batch_size % shares:
        below = batch_size // shares * shares
        choices = f"{below} or {below + shares}" if below else f"{shares}"
        raise BatchError(
            f"train.global_batch_size={batch_size}: must be a multiple of mesh data x fsdp x "
            f"gradient_accumulation = {shares}; use {choices}."
        )


def _flops_per_example(config: Config) -> float:
    """UNet forward once and backward at twice that, frozen networks forward."""
    model, side = config.model, resolve.resolution(config)
    latent = side // resolve.vae_factor(config)
    return (
        3 * flops.unet_forward_flops(model.unet, latent, latent)
        + flops.vae_encode_flops(model.vae, side, side)
        + flops.text_flops(model.text_encoder)
    )
