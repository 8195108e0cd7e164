"""Attention over the devices of a mesh, each on its own part of the arrays.

The batch is split over axes data and fsdp. Over axis tensor go either heads or, with
`shards_sequence`, queries by their length: then every device gathers all keys and values, and
computes whole rows of the weights, so that nothing is exchanged in between. (Ring attention, arXiv
2310.01889, splits the keys too: for lengths whose keys alone are too much for a device.)
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from sdx.models.attention import KernelFn


@dataclass(frozen=True, eq=False)  # networks hold it, and must be hashable
class OverMesh:
    """`attention` in a `shard_map` over `mesh`; an AttentionFn.

    A batch or heads that do not divide stay whole, and every device of that axis computes all of
    them; queries must divide.
    """

    attention: KernelFn
    mesh: Mesh
    shards_sequence: bool

    def __call__(
        self,
        query: Float[Array, "b s h d"],
        key: Float[Array, "b t h d"],
        value: Float[Array, "b t h d"],
        *,
        upcast: bool,
        precision: jax.lax.Precision,
        present: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b s h d"]:
        """What `attention` makes of the whole arrays."""
        queries, keys = self._places(query)
        arrays, places = (query, key, value), (queries, keys, keys)
        if present is not None:
            arrays, places = (*arrays, present), (*places, P(keys[0]))

        def compute(q: Array, k: Array, v: Array, *mask: Array) -> Array:
            masks: dict[str, Any] = {"present": mask[0]} if mask else {}
            return self.attention(q, k, v, upcast=upcast, precision=precision, **masks)

        # Pallas' calls do not say over which axes they vary, which is what check_vma checks.
        parts: dict[str, Any] = {"in_specs": places, "out_specs": queries, "check_vma": False}
        return jax.shard_map(compute, mesh=self.mesh, **parts)(*arrays)

    def _places(self, query: Array) -> tuple[P, P]:
        """Where queries and the outcome lie, and where keys and values do."""
        num_examples, length, num_heads, _ = query.shape
        tensor = self.mesh.shape["tensor"]
        shares = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch = ("data", "fsdp") if num_examples % shares == 0 else None
        if self.shards_sequence:
            assert length % tensor == 0, f"{length} queries over {tensor} devices"
            return P(batch, "tensor"), P(batch)
        place = P(batch, None, "tensor" if num_heads % tensor == 0 else None)
        return place, place
