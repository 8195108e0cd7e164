"""`model.*`: shapes of parameters, and what the networks compute with."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.models.unet import TimestepEmbedding
from tests.effects.effect import Case, Effect
from tests.effects.tracing import (
    Observer,
    epsilons,
    group_counts,
    heads,
    precisions,
    primitives,
    product_types,
)


def shape(address: str) -> Observer:
    """Of one parameter, by its path."""

    def observe(case: Case) -> tuple[int, ...]:
        return _at(case, address).shape

    return observe


def count(address: str) -> Observer:
    """Parts below a path."""

    def observe(case: Case) -> int:
        return len(_at(case, address))

    return observe


def stored_types(case: Case) -> set[str]:
    """Of trained weights, their average and the moments."""
    state = case.program.abstract_state
    arrays = jax.tree.leaves((state.params, state.ema, state.opt_state))
    return {str(one.dtype) for one in arrays if jnp.issubdtype(one.dtype, jnp.floating)}


def latent_side(case: Case) -> int:
    """Latents on one side of a picture of 16 pixels."""
    program = case.program
    encode: Any = program.encode
    return encode.eval_shape(program.abstract_frozen, program.abstract_batch)[0].shape[1]


def timestep_features(case: Case) -> list[float]:
    """What the UNet makes of timestep 1, before its first product."""
    seen: list[Any] = []

    class Seen(Exception):
        pass

    def note(self: Any, x: Any) -> Any:
        seen.append(np.asarray(x[0]))
        raise Seen

    unet = case.program.networks.unet
    params = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), unet.abstract())
    latents, states = jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 77, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimestepEmbedding, "__call__", note)
        with pytest.raises(Seen):
            unet.apply(params, latents, jnp.ones(1, jnp.int32), states)
    return [round(float(one), 4) for one in seen[0]]


def _at(case: Case, address: str) -> Any:
    program = case.program
    return reduce(
        lambda node, name: node[name],
        address.split("."),
        program.abstract_state.params | program.abstract_frozen,
    )


UNET, VAE, TEXT = "model.unet.", "model.vae.", "model.text_encoder."
BFLOAT16 = ("model.activations_dtype=bfloat16",)
TWO_LEVELS = (
    UNET + "block_out_channels=[8,16]",
    UNET + "down_block_types=[CrossAttnDownBlock2D,CrossAttnDownBlock2D]",
    UNET + "attention_head_dim=[2,4]",
)
EIGHT_LATENTS = (UNET + "in_channels=8", UNET + "out_channels=8", VAE + "latent_channels=8")
KERNEL = "unet.down_blocks.0.attentions.0.proj_in.kernel"
LAYERS = "text_encoder.encoder.layers"
# The ResNet blocks of the UNet above: one on the way down, two in the middle, two on the way up.
RESNETS, TRANSFORMERS = 5, 4

EFFECTS = [
    Effect("model.weights_dtype", "bfloat16", stored_types, {"float32"}, {"bfloat16"}),
    Effect(
        "model.activations_dtype",
        "bfloat16",
        lambda case: set(product_types("unet")(case)),
        {"float32"},
        {"bfloat16"},
        given=("attention=dot_product",),
    ),
    Effect("model.matmul_precision", "highest", precisions, {"default"}, {"highest"}),
    Effect(
        UNET + "in_channels",
        "8",
        shape("unet.conv_in.kernel"),
        (3, 3, 4, 8),
        (3, 3, 8, 8),
        along=EIGHT_LATENTS,
    ),
    Effect(
        UNET + "out_channels",
        "8",
        shape("unet.conv_out.kernel"),
        (3, 3, 8, 4),
        (3, 3, 8, 8),
        along=EIGHT_LATENTS,
    ),
    Effect(
        UNET + "block_out_channels",
        "[16]",
        shape("unet.conv_in.kernel"),
        (3, 3, 4, 8),
        (3, 3, 4, 16),
    ),
    Effect(UNET + "layers_per_block", "2", count("unet.down_blocks.0.resnets"), 1, 2),
    Effect(
        UNET + "down_block_types",
        "[CrossAttnDownBlock2D,DownBlock2D]",
        lambda case: "attentions" in _at(case, "unet.down_blocks.1"),
        True,
        False,
        given=TWO_LEVELS,
    ),
    Effect(
        UNET + "attention_head_dim",
        "[4]",
        lambda case: set(heads("unet")(case)),
        {2},
        {4},
        given=("attention=dot_product",),
    ),
    Effect(
        UNET + "cross_attention_dim",
        "32",
        shape("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.kernel"),
        (64, 8),
        (32, 8),
        along=(TEXT + "hidden_size=32",),
    ),
    Effect(UNET + "use_linear_projection", "false", shape(KERNEL), (8, 8), (1, 1, 8, 8)),
    Effect(
        UNET + "upcast_attention",
        "true",
        lambda case: product_types("unet")(case).get("float32", 0),
        0,
        2 * TRANSFORMERS,  # the logits of self-attention and of cross-attention
        given=("attention=dot_product", *BFLOAT16),
    ),
    Effect(UNET + "norm_num_groups", "2", group_counts("unet"), {4}, {2}),
    Effect(
        UNET + "norm_eps",
        "1e-3",
        epsilons("unet"),
        # two in a ResNet block and the last; three LayerNorms and one of groups in a transformer
        {1e-5: 2 * RESNETS + 1 + 3 * TRANSFORMERS, 1e-6: TRANSFORMERS},
        {1e-3: 2 * RESNETS + 1, 1e-5: 3 * TRANSFORMERS, 1e-6: TRANSFORMERS},
    ),
    Effect(
        UNET + "flip_sin_to_cos",
        "false",
        timestep_features,
        [0.5403, 0.995, 0.9999, 1.0, 0.8415, 0.0998, 0.01, 0.001],  # of 1, 0.1, 0.01 and 0.001
        [0.8415, 0.0998, 0.01, 0.001, 0.5403, 0.995, 0.9999, 1.0],
    ),
    Effect(
        UNET + "freq_shift",
        "1",
        timestep_features,
        [0.5403, 0.995, 0.9999, 1.0, 0.8415, 0.0998, 0.01, 0.001],
        [0.5403, 0.9989, 1.0, 1.0, 0.8415, 0.0464, 0.0022, 0.0001],  # down to 1 / MAX_PERIOD
    ),
    Effect(
        VAE + "in_channels",
        "4",
        shape("vae.encoder.conv_in.kernel"),
        (3, 3, 3, 8),
        (3, 3, 4, 8),
        along=(VAE + "out_channels=4",),
        refused=True,
    ),
    Effect(
        VAE + "out_channels",
        "4",
        shape("vae.decoder.conv_out.kernel"),
        (3, 3, 8, 3),
        (3, 3, 8, 4),
        along=(VAE + "in_channels=4",),
        refused=True,
    ),
    Effect(
        VAE + "latent_channels",
        "8",
        shape("vae.quant_conv.kernel"),  # of moments
        (1, 1, 8, 8),
        (1, 1, 16, 16),
        along=EIGHT_LATENTS,
    ),
    Effect(
        VAE + "block_out_channels",
        "[8,16,32]",
        latent_side,
        2,
        4,
        along=("model.resolution=32",),
    ),
    Effect(VAE + "layers_per_block", "2", count("vae.encoder.down_blocks.0.resnets"), 1, 2),
    Effect(VAE + "norm_num_groups", "2", group_counts("vae"), {1}, {2}),
    Effect(
        TEXT + "vocab_size",
        "600",
        shape("text_encoder.embeddings.token_embedding.embedding"),
        (584, 64),
        (600, 64),
    ),
    Effect(
        TEXT + "hidden_size",
        "32",
        shape("text_encoder.final_layer_norm.scale"),
        (64,),
        (32,),
        along=(UNET + "cross_attention_dim=32",),
    ),
    Effect(
        TEXT + "intermediate_size", "128", shape(f"{LAYERS}.0.mlp.fc1.kernel"), (64, 256), (64, 128)
    ),
    Effect(TEXT + "num_hidden_layers", "3", count(LAYERS), 2, 3),
    Effect(TEXT + "num_attention_heads", "8", heads("text_encoder"), [4, 4], [8, 8]),
    Effect(
        TEXT + "max_position_embeddings",
        "50",
        lambda case: case.program.abstract_batch.tokens.shape,
        (4, 77),
        (4, 50),
    ),
    Effect(
        TEXT + "hidden_act",
        "quick_gelu",
        primitives("text_encoder", "erf", "erfc", "logistic"),
        {"erfc": 2},
        {"logistic": 2},
    ),
    Effect(
        TEXT + "layer_norm_eps",
        "1e-3",
        epsilons("text_encoder"),
        {1e-5: 5},  # two in a layer, and the last
        {1e-3: 5},
    ),
]
