"""What the shapes of a component's arrays tell of its architecture.

For files that come without a config.json: the keys are those of the libraries' configs, names and
layout are torch's of today. Shapes do not tell the number of attention heads, the activation, the
groups and epsilons of norms, or the scaling factor.
"""

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# (key, array, dim of it)
SIZES: dict[str, tuple[tuple[str, str, int], ...]] = {
    "unet": (
        ("in_channels", "conv_in.weight", 1),
        ("out_channels", "conv_out.weight", 0),
        (
            "cross_attention_dim",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            1,
        ),
    ),
    "vae": (
        ("in_channels", "encoder.conv_in.weight", 1),
        ("out_channels", "decoder.conv_out.weight", 0),
        ("latent_channels", "decoder.conv_in.weight", 1),
    ),
    "text_encoder": (
        ("vocab_size", "embeddings.token_embedding.weight", 0),
        ("hidden_size", "embeddings.token_embedding.weight", 1),
        ("max_position_embeddings", "embeddings.position_embedding.weight", 0),
        ("intermediate_size", "encoder.layers.0.mlp.fc1.weight", 0),
    ),
}
LEVELS = {"unet": "down_blocks", "vae": "encoder.down_blocks"}
PROJECTION = "mid_block.attentions.0.proj_in.weight"


def told_by_shapes(component: str, shapes: Shapes) -> dict[str, Any]:
    """Keys of the component's config.json that `shapes` decide; fewer where arrays are missing."""
    told: dict[str, Any] = {
        key: shapes[name][dim] for key, name, dim in SIZES[component] if name in shapes
    }
    if component == "text_encoder":
        return told | {
            "num_hidden_layers": len(_numbered(shapes, "encoder.layers.{}.mlp.fc1.bias"))
        }
    levels = LEVELS[component]
    channels = [rows for rows, *_ in _numbered(shapes, levels + ".{}.resnets.0.conv1.weight")]
    told["block_out_channels"] = channels
    told["layers_per_block"] = len(_numbered(shapes, levels + ".0.resnets.{}.conv1.weight"))
    if component == "unet":
        attended = (
            f"{levels}.{i}.attentions.0.norm.weight" in shapes for i in range(len(channels))
        )
        told["down_block_types"] = [
            "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attended
        ]
        told["use_linear_projection"] = len(shapes.get(PROJECTION, ())) == 2
    return told


def _numbered(shapes: Shapes, pattern: str) -> list[tuple[int, ...]]:
    """Shapes of the arrays that `pattern` names with 0, 1, 2, ... in it."""
    found = []
    while (name := pattern.format(len(found))) in shapes:
        found.append(shapes[name])
    return found
