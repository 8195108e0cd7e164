"""Whole arrays between a host and a mesh, also one of which a process has only a part."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array, Shaped


def place_whole(
    array: Shaped[Array | np.ndarray, "..."], place: NamedSharding
) -> Shaped[Array, "..."]:
    """The array on the mesh; of a numpy array every process gives the same."""
    if isinstance(array, jax.Array) or place.is_fully_addressable:
        return jax.device_put(array, place)
    return jax.make_array_from_callback(np.shape(array), place, lambda index: array[index])


def to_host(array: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """The whole value, in every process; all of them call it where one has only a part."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def tree_to_first_host(tree: Any, *, keeps: bool) -> Any:
    """The tree with whole values on the host, one array after the other; all processes call it, and
    those that do not keep it get None for each."""

    def whole(array: Array) -> np.ndarray | None:
        value = to_host(array)
        return value if keeps else None

    return jax.tree.map(whole, tree)
