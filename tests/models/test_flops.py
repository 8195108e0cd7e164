"""Counted operations are those of the traced networks, and the published totals."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdx.config.compose import compose
from sdx.config.schema import DownBlock
from sdx.models import flops, layers
from sdx.models.attention import dot_product_attention
from sdx.models.networks import make_networks
from tests.micro import micro_model

pytestmark = pytest.mark.fast


def traced(function: Any, *shapes: Any) -> float:
    """Two operations for each multiply-add of the products and convolutions in a trace."""
    return _counted(jax.make_jaxpr(function)(*shapes).jaxpr)


def _counted(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
        total += sum(_counted(value.jaxpr) for value in inner)
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2.0 * out * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += 2.0 * out * math.prod(equation.invars[1].aval.shape[:3])
    return total


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_published_totals_of_sd21() -> None:
    model = compose(["model=sd21"]).model
    assert flops.unet_forward_flops(model.unet, 64, 64) == pytest.approx(2 * 402.1e9, rel=1e-3)
    assert flops.unet_forward_flops(model.unet, 96, 96) == pytest.approx(2149e9, rel=1e-3)
    assert flops.vae_encode_flops(model.vae, 512, 512) == pytest.approx(1117e9, rel=1e-3)
    assert flops.vae_decode_flops(model.vae, 512, 512) == pytest.approx(2515e9, rel=1e-3)
    assert flops.text_flops(model.text_encoder) == pytest.approx(45e9, rel=0.01)


def test_counts_are_those_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    # what is counted is the convolution of the enlarged image, not the CPU's shorter way
    plain = lambda x, kernel, precision: layers._enlarged(precision, x, kernel)  # noqa: E731
    monkeypatch.setattr(layers, "_convolve_doubled", plain)
    model = micro_model()
    model = replace(
        model,
        unet=replace(
            model.unet,
            block_out_channels=[8, 16, 24],
            down_block_types=[DownBlock.CrossAttnDownBlock2D] * 2 + [DownBlock.DownBlock2D],
            attention_head_dim=[2, 2, 4],
            layers_per_block=2,
        ),
    )
    networks = make_networks(model, attention=dot_product_attention, dtype="float32")
    unet, vae, text = networks.unet, networks.vae, networks.text_encoder
    width, tokens = model.unet.cross_attention_dim, model.text_encoder.max_position_embeddings
    factor = 2 ** (len(model.vae.block_out_channels) - 1)
    side_h, side_w = 16 * factor, 24 * factor

    # 9 x 15 latents: no level below the first divides them
    inputs = zeros(1, 9, 15, 4), zeros(1, dtype=jnp.int32), zeros(1, tokens, width)
    counted = traced(unet.apply, unet.abstract(), *inputs)
    assert flops.unet_forward_flops(model.unet, 9, 15, tokens) == counted
    encode = traced(
        lambda p, x: vae.apply(p, x, method="encode"), vae.abstract(), zeros(1, side_h, side_w, 3)
    )
    assert flops.vae_encode_flops(model.vae, side_h, side_w) == encode
    decode = traced(
        lambda p, x: vae.apply(p, x, method="decode"), vae.abstract(), zeros(1, 16, 24, 4)
    )
    assert flops.vae_decode_flops(model.vae, side_h, side_w) == decode
    counted = traced(text.apply, text.abstract(), zeros(1, tokens, dtype=jnp.int32))
    assert flops.text_flops(model.text_encoder) == counted
