"""A network as pure functions over a plain nested dict of arrays.

NNX builds the networks; jitted code sees only dicts, whose dispatch costs 2 ms for a UNet's 686
arrays where an NNX module costs 100 to 300 (Python of `nnx.jit`). Keys are strings all the way
down, list indices too ("0"), so a path reads as diffusers' module name and a checkpoint comes
back with the keys it went in with.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from sdx.models.layers import LAWS, draw, draw_parts

Params = dict[str, Any]  # nested; leaves are arrays, or ShapeDtypeStructs where abstract
Path = tuple[str, ...]


class Pure:
    """The parameters and methods of the network that `make` builds, without the network."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make

    def init(self, key: Array, *, in_parts: bool = False) -> Params:
        """Random parameters, a function of `key` alone; jit it to make them sharded.

        All parameters of one law are slices of one draw: XLA:CPU compiles a draw in about a second,
        and a small UNet has two hundred parameters. With `in_parts` they are the same numbers, but
        none is computed where it does not lie: for devices that share the parameters.
        """
        values = {}
        for law in LAWS:
            alike = {path: v for path, v in self._variables.items() if v.initial.law == law}
            drawn = (_slices if in_parts else _cuts)(
                law, jax.random.fold_in(key, LAWS.index(law)), [v.shape for v in alike.values()]
            )
            for (path, v), numbers in zip(alike.items(), drawn, strict=True):
                values[path] = (v.initial.spread * numbers).astype(v.dtype)
        return nested({path: values[path] for path in self._variables})

    def abstract(self) -> Params:
        """Shapes and types of the parameters; computes nothing."""
        return nested({path: variable.get_value() for path, variable in self._variables.items()})

    def apply(self, params: Params, *args: Any, method: str = "__call__") -> Any:
        """What the network's `method` returns with these parameters; call it inside a trace."""
        graphdef, state = self._parts
        values = flat(params)
        state = nnx.map_state(lambda path, v: v.replace(values[_names(path)]), state)
        return getattr(nnx.merge(graphdef, state), method)(*args)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        """NNX graph definition and abstract state (their own types hold hints beartype refuses)."""
        return nnx.split(nnx.eval_shape(lambda: self._make(nnx.Rngs(params=jax.random.key(0)))))

    @cached_property
    def _variables(self) -> dict[Path, Any]:
        return {_names(path): variable for path, variable in nnx.to_flat_state(self._parts[1])}


def pure(make: Callable[[nnx.Rngs], nnx.Module]) -> Pure:
    """The network that `make` builds from its random streams, as pure functions."""
    return Pure(make)


def _cuts(law: str, key: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
    """One draw, cut up."""
    ends = list(accumulate(map(math.prod, shapes)))
    pool = draw(law, key, (sum(ends[-1:]),))
    starts = zip([0, *ends], ends, shapes, strict=False)
    return [pool[start:end].reshape(shape) for start, end, shape in starts]


def _slices(law: str, key: Array, shapes: list[tuple[int, ...]]) -> list[Array]:
    """The same arrays, those of one shape together and each number where it lies."""
    starts = [0, *accumulate(map(math.prod, shapes))]
    arrays: dict[int, Array] = {}
    for shape in dict.fromkeys(shapes):
        alike = [i for i, other in enumerate(shapes) if other == shape]
        drawn = draw_parts(law, key, [starts[i] for i in alike], shape)
        arrays |= dict(zip(alike, drawn, strict=True))
    return [arrays[i] for i in range(len(shapes))]


def flat(params: Params) -> dict[Path, Any]:
    """Path to leaf, in the order of the tree."""
    leaves: dict[Path, Any] = {}
    for key, value in params.items():
        below = flat(value) if isinstance(value, dict) else {(): value}
        leaves |= {(key, *path): leaf for path, leaf in below.items()}
    return leaves


def nested(leaves: Mapping[Path, Any]) -> Params:
    """The nested dict that `flat` flattens."""
    params: Params = {}
    for (*parents, name), leaf in leaves.items():
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(map(str, path))
