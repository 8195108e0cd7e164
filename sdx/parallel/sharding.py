"""Where each array lies on the mesh: an ordered table of rules for parameters, and the sharding of
batches.

The first rule whose pattern is found in a parameter's path decides; what no rule names goes to
`fsdp` along its largest divisible dim; arrays under 64 KiB stay whole on every device. Optimizer
state and EMA inherit by path; what has no parameter's shape (Adafactor's means) falls under the
same two last rules.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdx.parallel.mesh import BATCH_AXES

SMALLEST_SHARDED_BYTES = 64 * 1024

AnyMesh = Mesh | AbstractMesh
"""Of devices, or of their number alone."""

Rule = tuple[str, P]
UNET_RULES: tuple[Rule, ...] = (
    (r"attn[12]/to_[qkv]/kernel$", P("fsdp", "tensor")),
    (r"attn[12]/to_out/0/kernel$", P("tensor", "fsdp")),
    (r"ff/net/0/proj/kernel$", P("fsdp", "tensor")),
    (r"ff/net/2/kernel$", P("tensor", "fsdp")),
)
TEXT_ENCODER_RULES: tuple[Rule, ...] = (
    (r"self_attn/[qkv]_proj/kernel$", P("fsdp", "tensor")),
    (r"self_attn/out_proj/kernel$", P("tensor", "fsdp")),
    (r"mlp/fc1/kernel$", P("fsdp", "tensor")),
    (r"mlp/fc2/kernel$", P("tensor", "fsdp")),
)
"""Megatron's pairing (Shoeybi et al. 2019, arXiv 1909.08053, section 3): widen over `tensor`, then
narrow over it."""


class ShardingError(ValueError):
    """A sharding rule names parameters that the model does not have."""


def path_name(path: Sequence[Any]) -> str:
    """A tree path as `down_blocks/0/resnets/0/conv1/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def parameter_shardings(params: Any, mesh: AnyMesh, rules: Sequence[Rule] = ()) -> Any:
    """The sharding of each array of `params` (arrays or shapes), in a tree of the same structure.

    Raises ShardingError when a rule matches no parameter.
    """
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    idle = [rule for rule, _ in rules if not any(re.search(rule, name) for name in names)]
    if idle:
        raise ShardingError(
            f"sharding: {len(idle)} of {len(rules)} rules match no parameter: {', '.join(idle)}; "
            f"paths look like {names[0]}; correct the table in sdx/parallel/sharding.py."
        )
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf, mesh, rules)), params
    )


def state_shardings(state: Any, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
    """Shardings of a whole training state: leaves whose path ends in a parameter's path, with its
    shape, lie as it does; others like parameters that no rule names, counters on every device.
    """
    known = _by_path(params, shardings)

    def inherit(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        parts = name.split("/")
        for start in range(len(parts)):
            found = known.get("/".join(parts[start:]))
            if found and found[0] == leaf.shape:
                return found[1]
        return NamedSharding(mesh, _spec(name, leaf, mesh, rules=()))

    return jax.tree.map_with_path(inherit, state)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """First dim over data and fsdp, the rest whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


@dataclass(frozen=True)
class OverWidth:
    """Splits the last dim of an array over `tensor`, where it divides; the first may lie as it
    likes, so that a gradient is scattered and not gathered."""

    mesh: Mesh

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` with that constraint."""
        if x.shape[-1] % self.mesh.shape["tensor"]:
            return x
        between = [None] * (x.ndim - 2)
        place = NamedSharding(self.mesh, P(P.UNCONSTRAINED, *between, "tensor"))
        return jax.lax.with_sharding_constraint(x, place)


def over_width(mesh: Mesh) -> OverWidth | None:
    """How devices share the width of layers; None where each has all of it."""
    return OverWidth(mesh) if mesh.shape["tensor"] > 1 else None


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_divisor(mesh: AnyMesh) -> int:
    """The number of shares a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclass(frozen=True)
class Placement:
    """Bytes of arrays that lie on a mesh."""

    total: int
    """Of each array once."""
    on_device: int
    """Of what one device holds."""
    whole: Mapping[str, int]
    """Path and bytes of each array that every device holds whole, the largest first."""

    @property
    def sharded_share(self) -> float:
        """Share of the bytes in arrays of which a device holds only a part."""
        return 1 - sum(self.whole.values()) / self.total


def placement(arrays: Any) -> Placement:
    """How arrays, or shapes with shardings, lie on their mesh."""
    total = on_device = 0
    whole = {}
    for path, leaf in jax.tree.leaves_with_path(arrays):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        total += leaf.size * leaf.dtype.itemsize
        on_device += part * leaf.dtype.itemsize
        if part == leaf.size:
            whole[path_name(path)] = leaf.size * leaf.dtype.itemsize
    by_size = sorted(whole.items(), key=lambda row: -row[1])
    return Placement(total, on_device, dict(by_size))


def _by_path(params: Any, shardings: Any) -> Mapping[str, tuple[tuple[int, ...], NamedSharding]]:
    leaves = jax.tree.leaves_with_path(params)
    places = jax.tree.leaves(shardings)
    return {
        path_name(path): (leaf.shape, place)
        for (path, leaf), place in zip(leaves, places, strict=True)
    }


def _spec(name: str, leaf: Any, mesh: AnyMesh, rules: Sequence[Rule]) -> P:
    if leaf.size * leaf.dtype.itemsize < SMALLEST_SHARDED_BYTES:
        return P()
    for pattern, spec in rules:
        if re.search(pattern, name) and _divides(spec, leaf.shape, mesh):
            return spec
    dims = [dim for dim, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] == 1 or not dims:
        return P()
    largest = max(dims, key=lambda dim: leaf.shape[dim])
    return P(*("fsdp" if dim == largest else None for dim in range(largest + 1)))


def _divides(spec: P, shape: tuple[int, ...], mesh: AnyMesh) -> bool:
    return all(
        axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True)
    )
