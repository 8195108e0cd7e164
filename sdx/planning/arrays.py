"""Shapes and places of what a run holds on its devices, of which none is needed: exact, and the
program's own (training/program.py), over a mesh of sizes alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sdx.config import resolve
from sdx.config.check_mesh import AXES, mesh_sizes
from sdx.config.errors import ConfigError, Problem
from sdx.config.schema import Config, Platform
from sdx.config.sizes import Size
from sdx.models.attention import dot_product_attention
from sdx.models.networks import make_networks
from sdx.parallel.sharding import path_name
from sdx.planning.activations import LANES
from sdx.planning.temporaries import Weights
from sdx.training.optimizer import make_optimizer
from sdx.training.program import (
    Batch,
    abstract_arrays,
    abstract_batch,
    check_batch,
    placed_arrays,
)
from sdx.training.state import Params, TrainState

SUBLANES = 8


@dataclass(frozen=True)
class Arrays:
    """What `step` and `encode` are given, as shapes with places."""

    mesh: AbstractMesh
    state: TrainState
    frozen: Params
    batch: Batch
    global_batch_size: int


def describe(config: Config, like: Arrays | None = None) -> Arrays:
    """What a run of `config` holds; `like` is that of a run with the same state on another mesh.

    Raises ConfigError where the number of devices is not given or the mesh does not fit them, and
    BatchError where the batch does not.
    """
    mesh = described_mesh(config)
    size = resolve.global_batch_size(config, mesh.size)
    check_batch(config, mesh, size)
    if like is None:
        state, frozen = _arrays(config, mesh)
    else:
        state, frozen = placed_arrays(mesh, like.state, like.frozen)
    side = resolve.resolution(config)
    batch = batch_of(config, mesh, size, (side, side))
    return Arrays(mesh, state, frozen, batch, size)


def batch_of(config: Config, mesh: AbstractMesh, size: int, image: Size) -> Batch:
    """A global batch of that size, of images of that height and width."""
    return abstract_batch(config, mesh, size, image)


def described_mesh(config: Config) -> AbstractMesh:
    """The sizes of the axes on hardware that is not here."""
    hardware = config.hardware
    if hardware.num_devices is None:
        rule = f"missing, hardware={hardware.name} is whatever is found where it runs"
        fix = "give hardware.num_devices=N, or a preset that says"
        raise ConfigError([Problem("hardware.num_devices", None, rule, fix)])
    sizes = mesh_sizes(config.mesh, hardware)
    assert sizes is not None, "config.check refuses what does not fit"
    return AbstractMesh(sizes.total, AXES, (AxisType.Auto,) * len(AXES))


def on_a_device(tree: Any, platform: Platform) -> int:
    """Bytes that `tree` takes on one device of that platform."""
    stored = tpu_numbers if platform is Platform.tpu else math.prod
    return sum(
        stored(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def tpu_numbers(shape: Sequence[int]) -> int:
    """Numbers of an array as a TPU stores it: the last two dims, in the order that takes less, are
    filled up to tiles of 8 by 128, a single one to tiles of up to 1024.

    Read off the argument layouts of compiled programs; a kernel (3, 3, 320, 320) takes a fifth more
    than its numbers.
    """
    if not shape:
        return LANES
    if len(shape) == 1:
        return _filled(shape[0], min(1024, max(LANES, _power_of_two(shape[0]))))
    *major, a, b = shape
    rows = (_filled(x, min(SUBLANES, _power_of_two(x))) for x in (a, b))
    columns = (_filled(x, LANES) for x in (b, a))
    return math.prod(major) * min(math.prod(pair) for pair in zip(rows, columns, strict=True))


def _power_of_two(size: int) -> int:
    """The first that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def _filled(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def whole(tree: Any) -> int:
    """Bytes of `tree`, once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    """Numbers in `tree`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def trained_weights(state: TrainState) -> Mapping[str, Weights]:
    """Trained numbers by the path of their array."""
    return {
        path_name(path): Weights(
            on_device=math.prod(leaf.sharding.shard_shape(leaf.shape)), whole=leaf.size
        )
        for path, leaf in jax.tree.leaves_with_path(state.params)
    }


def _arrays(config: Config, mesh: AbstractMesh) -> tuple[TrainState, Params]:
    names = ("unet", "text_encoder") if config.train.text_encoder else ("unet",)
    optimizer = make_optimizer(config.optimizer, dict.fromkeys(names, jnp.float32))
    networks = make_networks(
        config.model,
        attention=dot_product_attention,  # has no parameters
        dtype=resolve.activations_dtype(config),
        trains_text_encoder=config.train.text_encoder,
    )
    return abstract_arrays(config, mesh, networks, optimizer)
