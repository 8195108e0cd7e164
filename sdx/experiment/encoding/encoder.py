"""The frozen networks over the devices of this process, for batches of a fixed size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float16, Int32, UInt8

from sdx.config import resolve
from sdx.config.schema import Config
from sdx.parallel import sharding
from sdx.parallel.mesh import AXES
from sdx.training.program import image_moments, networks_of, text_states
from sdx.training.state import Params
from sdx.weights.load import LOADERS
from sdx.weights.model_files import ModelFiles

EncodeImages = Callable[[UInt8[np.ndarray, "b H W 3"]], Float16[Array, "b h w m"]]
EncodeTokens = Callable[[Int32[np.ndarray, "b s"]], Float16[Array, "b s d"]]


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of `mesh`, each with a share of the batch."""
    devices = np.array(mesh.local_devices).reshape(-1, 1, 1)
    return Mesh(devices, AXES, axis_types=mesh.axis_types)


def image_encoder(config: Config, mesh: Mesh, weights: ModelFiles, num_images: int) -> EncodeImages:
    """The VAE's moments of `num_images` images, computed as training computes them."""
    networks, side = networks_of(config, mesh), resolve.resolution(config)
    shape = (num_images, side, side, config.model.vae.in_channels)
    params = _load(weights, "vae", networks.vae.abstract(), mesh)
    return _compiled(
        lambda params, images: image_moments(networks, params, images),
        params,
        jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding.batch_sharding(mesh)),
    )


def token_encoder(config: Config, mesh: Mesh, weights: ModelFiles, num_rows: int) -> EncodeTokens:
    """The text encoder's states of `num_rows` rows of tokens, computed as training does."""
    networks, length = networks_of(config, mesh), config.model.text_encoder.max_position_embeddings
    params = _load(weights, "text_encoder", networks.text_encoder.abstract(), mesh)
    return _compiled(
        lambda params, tokens: text_states(networks, params, tokens),
        params,
        jax.ShapeDtypeStruct((num_rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh)),
    )


def _load(weights: ModelFiles, name: str, abstract: Params, mesh: Mesh) -> Params:
    place = sharding.replicated(mesh)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract
    )
    return LOADERS[name](weights, placed)


def _compiled(function: Callable[..., Array], params: Params, batch: Any) -> Callable[..., Array]:
    """`function` of a batch on the host, in float16; its result is awaited by whoever reads it."""
    halved = jax.jit(
        lambda params, x: function(params, x).astype(jnp.float16), out_shardings=batch.sharding
    )
    compiled = halved.lower(params, batch).compile()
    return lambda rows: compiled(params, jax.device_put(rows, batch.sharding))
