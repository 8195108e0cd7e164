"""Of the UNet what parity does not show: recomputation and types of computation."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import MatmulPrecision, Remat
from sdx.models.attention import dot_product_attention
from sdx.models.networks import make_networks
from tests.micro import micro_model

INPUTS = (
    jax.random.normal(jax.random.key(1), (2, 4, 4, 4)),
    jnp.array([0, 999]),
    jax.random.normal(jax.random.key(2), (2, 8, 8)),
)
# Compiling is the cost, and it is the same mathematics unoptimised.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def unet(remat: Remat = Remat.none, dtype: str = "float32", **model: Any) -> Any:
    config = replace(micro_model(), **model)
    return make_networks(config, attention=dot_product_attention, dtype=dtype, remat=remat).unet


def loss_of(network: Any) -> Any:
    return lambda params: jnp.sum(jnp.square(network.apply(params, *INPUTS)))


def quickly(function: Any, *args: Any) -> Any:
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)


def equations(jaxpr: Any) -> list[Any]:
    """Every equation, those inside calls and recomputed regions too."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_has_equations):
            if _has_equations(value):
                found += equations(getattr(value, "jaxpr", value))
    return found


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_recomputing_changes_memory_not_numbers() -> None:
    params = unet().init(jax.random.key(0))
    results = {}
    for remat in Remat:
        results[remat] = quickly(jax.value_and_grad(loss_of(unet(remat))), params)
    for remat in (Remat.blocks, Remat.dots, Remat.full):
        jax.tree.map(
            lambda plain, again: np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-6),
            results[Remat.none],
            results[remat],
        )


def test_what_is_recomputed() -> None:
    """Convolutions and products of layers in a gradient: dots keeps all results, blocks and full
    compute some again."""
    params = unet().abstract()
    for kind in ("conv_general_dilated", "dot_general"):
        counts = {}
        for remat in Remat:
            jaxpr = jax.make_jaxpr(jax.grad(loss_of(unet(remat))))(params)
            names = Counter(
                equation.primitive.name
                for equation in equations(jaxpr.jaxpr)
                if not is_attention(equation)
            )
            counts[remat] = names[kind]
        assert counts[Remat.dots] == counts[Remat.none], kind
        assert counts[Remat.none] < counts[Remat.blocks] < counts[Remat.full], kind


def is_attention(equation: Any) -> bool:
    """Products of attention have dims of a batch, those of layers none."""
    if equation.primitive.name != "dot_general":
        return False
    _, (batch, _) = equation.params["dimension_numbers"]
    return bool(batch)


def test_bfloat16_computes_products_and_float32_the_rest() -> None:
    network = unet(dtype="bfloat16")
    jaxpr = jax.make_jaxpr(network.apply)(network.abstract(), *INPUTS)
    found = equations(jaxpr.jaxpr)
    dtypes: dict[str, set[Any]] = {}
    for equation in found:
        for value in equation.invars[:1]:
            dtypes.setdefault(equation.primitive.name, set()).add(value.aval.dtype)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    for name in ("reduce_sum", "rsqrt", "exp", "sin", "cos", "reduce_max"):
        assert dtypes[name] <= {jnp.dtype(jnp.float32)}, name
    for name in ("dot_general", "conv_general_dilated"):
        assert dtypes[name] == {jnp.dtype(jnp.bfloat16)}, name


def test_upcasting_computes_logits_in_float32() -> None:
    config = micro_model()
    network = unet(dtype="bfloat16", unet=replace(config.unet, upcast_attention=True))
    jaxpr = jax.make_jaxpr(network.apply)(network.abstract(), *INPUTS)
    dots = Counter(
        str(equation.invars[0].aval.dtype)
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    )
    num_attentions = 2 * 4  # self and cross, in one layer down, one in the middle, two up
    assert dots["float32"] == num_attentions


def test_bfloat16_agrees_with_float32() -> None:
    params = unet().init(jax.random.key(0))
    exact, rounded = (
        quickly(unet(dtype=d).apply, params, *INPUTS) for d in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", MatmulPrecision)
def test_precision_reaches_every_product(precision: MatmulPrecision) -> None:
    network = unet(matmul_precision=precision)
    jaxpr = jax.make_jaxpr(network.apply)(network.abstract(), *INPUTS)
    wanted = jax.lax.Precision[precision.name.upper()]
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            assert set(jax.tree.leaves([equation.params["precision"]])) == {wanted}, equation
