"""What a network computes with, read off the operations of its trace."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from tests.effects.effect import Case

PRODUCTS = ("dot_general", "conv_general_dilated")
Observer = Callable[[Case], Any]


def precisions(case: Case) -> set[str]:
    """Of every product and convolution in the three networks."""
    found = set()
    for name in ("unet", "vae", "text_encoder"):
        for operation in network(case, name):
            if operation.primitive.name in PRODUCTS:
                precision = operation.params["precision"]
                given = precision if isinstance(precision, tuple) else (precision,)
                found |= {"default" if one is None else one.name.lower() for one in given}
    return found


def product_types(name: str) -> Observer:
    """How many products of a network read each type."""

    def observe(case: Case) -> dict[str, int]:
        operations = network(case, name)
        products = [one for one in operations if one.primitive.name == "dot_general"]
        return dict(Counter(str(one.invars[0].aval.dtype) for one in products))

    return observe


def epsilons(name: str) -> Observer:
    """How many norms of a network add each number below their root."""

    def observe(case: Case) -> dict[float, int]:
        operations = network(case, name)
        made_by = {id(out): one for one in operations for out in one.outvars}
        sums = [made_by[id(one.invars[0])] for one in operations if one.primitive.name == "rsqrt"]
        added = [literal.val for one in sums for literal in one.invars if hasattr(literal, "val")]
        return dict(Counter(float(f"{number:.6g}") for number in added))

    return observe


def group_counts(name: str) -> Observer:
    """Into how many groups the norms of a network part their channels."""

    def observe(case: Case) -> set[int]:
        reshapes = [one for one in network(case, name) if one.primitive.name == "reshape"]
        pairs = [(one.invars[0].aval.shape, one.outvars[0].aval.shape) for one in reshapes]
        return {
            after[1]
            for before, after in pairs
            if len(after) == 3 and before == (after[0], after[1] * after[2])
        }

    return observe


def heads(name: str) -> Observer:
    """The heads of every attention of a network, in order."""

    def observe(case: Case) -> list[int]:
        found = []
        for one in network(case, name):
            if one.primitive.name == "dot_general":
                (_, (batch, _)), shape = one.params["dimension_numbers"], one.outvars[0].aval.shape
                if len(batch) == 2:
                    found.append(shape[1])
        return found[::2]  # logits, then what they weigh

    return observe


def primitives(name: str, *wanted: str) -> Observer:
    """Which of these operations a network holds, and how many."""

    def observe(case: Case) -> dict[str, int]:
        names = Counter(one.primitive.name for one in network(case, name))
        return {name: names[name] for name in wanted if names[name]}

    return observe


def network(case: Case, name: str) -> list[Any]:
    """Every operation of a network of the program."""
    return _traced(case.program.networks, name, _inputs(case, name))


@lru_cache(maxsize=64)
def _traced(networks: Any, name: str, inputs: Any) -> list[Any]:
    one, method = getattr(networks, name), "encode" if name == "vae" else "__call__"
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    traced = jax.make_jaxpr(lambda *args: one.apply(*args, method=method))
    return list(operations(traced(one.abstract(), *arrays).jaxpr))


def _inputs(case: Case, name: str) -> tuple[tuple[tuple[int, ...], Any], ...]:
    model, rows = case.config.model, 2
    side, length = 16, model.text_encoder.max_position_embeddings
    latents = (rows, side // model.vae.factor, side // model.vae.factor, model.unet.in_channels)
    states = (rows, length, model.unet.cross_attention_dim)
    return {
        "unet": ((latents, jnp.float32), ((rows,), jnp.int32), (states, jnp.float32)),
        "vae": (((rows, side, side, model.vae.in_channels), jnp.float32),),
        "text_encoder": (((rows, length), jnp.int32),),
    }[name]


def operations(jaxpr: Any) -> Iterator[Any]:
    for operation in jaxpr.eqns:
        yield operation
        for below in jaxprs_in_params(operation.params):
            yield from operations(below)
