"""One copy of the model is read, and the devices send it to the others.

Along `data` the mesh holds copies of the model. A checkpoint on a shared file system is read as
often as there are processes with a copy, unless only those of the first copy read it
(`checkpoint.single_replica_restore`). What they read reaches the others by a sum over `data` of the
arrays' bits, to which the others add zeros: exact for every float, minus zero and NaN included.
(Orbax's SingleReplicaArrayHandler sums the floats, and wants every host whole in one copy.)
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

SENT_AT_ONCE = 2**28  # bytes of one broadcast on a device, which needs them twice more meanwhile
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}

Abstract = Mapping[str, Any]
"""Arrays to come by name: jax.ShapeDtypeStruct with a NamedSharding, none of them over `data`."""


def num_replicas(mesh: Mesh) -> int:
    """Copies of the model on the mesh."""
    return mesh.shape["data"]


def readers(mesh: Mesh) -> set[int]:
    """The processes with devices of the first copy."""
    return {device.process_index for device in _first(mesh).devices.flat}


def on_first_replica(wanted: Abstract, mesh: Mesh) -> dict[str, Any]:
    """The same arrays, on the devices of the first copy alone."""
    first = _first(mesh)
    return {
        name: jax.ShapeDtypeStruct(
            like.shape, like.dtype, sharding=NamedSharding(first, like.sharding.spec)
        )
        for name, like in wanted.items()
    }


def send_to_all(
    read: dict[str, Shaped[Array, "..."]], wanted: Abstract, mesh: Mesh
) -> dict[str, Shaped[Array, "..."]]:
    """The arrays as `wanted`, from `on_first_replica`'s, which are used up; processes that have
    none of its devices give none."""
    sent: dict[str, Array] = {}
    for names in _at_once(wanted):
        copies = {name: _beside_zeros(read.pop(name, None), wanted[name], mesh) for name in names}
        places = {name: wanted[name].sharding for name in names}
        merged = jax.jit(_merge, donate_argnums=0, out_shardings=places)(copies)
        sent |= jax.block_until_ready(merged)
    return sent


def _first(mesh: Mesh) -> Mesh:
    assert mesh.axis_names[0] == "data"
    return Mesh(mesh.devices[:1], mesh.axis_names, axis_types=mesh.axis_types)


def _at_once(wanted: Abstract) -> Iterator[list[str]]:
    """The names in groups, the same ones in every process."""
    group: list[str] = []
    num_bytes = 0
    for name, like in wanted.items():
        size = np.prod(like.sharding.shard_shape(like.shape)) * like.dtype.itemsize
        if group and num_bytes + size > SENT_AT_ONCE:
            yield group
            group, num_bytes = [], 0
        group.append(name)
        num_bytes += size
    if group:
        yield group


def _beside_zeros(array: Array | None, like: Any, mesh: Mesh) -> Array:
    """(data, ...): the array in the first place, zeros in the others, each on its own devices."""
    place = NamedSharding(mesh, P("data", *like.sharding.spec))
    shape = like.sharding.shard_shape(like.shape)
    there = {} if array is None else {s.device: s.data for s in array.addressable_shards}
    zeros = np.zeros((1, *shape), like.dtype)
    parts = [
        there[device][None] if device in there else jax.device_put(zeros, device)
        for device in mesh.local_devices
    ]
    whole = (num_replicas(mesh), *like.shape)
    return jax.make_array_from_single_device_arrays(whole, place, parts)


def _merge(copies: dict[str, Array]) -> dict[str, Array]:
    return {name: _sum_of_bits(copy) for name, copy in copies.items()}


def _sum_of_bits(copies: Array) -> Array:
    kind = _BITS[copies.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(copies, kind)
    return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=0, dtype=kind), copies.dtype)
