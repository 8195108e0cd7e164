"""Names in original checkpoints: one file of CompVis' or Stability's layout, in today's spelling.

Such a file holds the UNet as one list of blocks, down to up, where diffusers has levels; the
autoencoder's decoder counts its levels from the lowest resolution; 2.x has its text encoder as
open_clip writes it, with query, key and value in one array. Sources: the modules of
CompVis/latent-diffusion and Stability-AI/stablediffusion (openaimodel.py and model.py in
ldm/modules/diffusionmodules, ldm/modules/encoders/modules.py); the tests hold the tables against
diffusers' own loader (diffusers/loaders/single_file_utils.py).
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from sdx.weights.names import current_name

# Where a component lies; of the text encoder also how it is written.
PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.model.",
    ),
}
OPEN_CLIP = re.compile(r"^(cond_stage_model|conditioner\.embedders\.0)\.model\.")
# open_clip's ViT-H/14 has 24 layers, 2.x takes the text states before the last ("penultimate").
UNUSED_LAYER = 23

# (start of the original name, today's, number of the list's first block)
UNET_BLOCKS: tuple[tuple[str, str, int], ...] = (
    (r"input_blocks\.(\d+)\.0\.op\.", "down_blocks.{level}.downsamplers.0.conv.", 1),
    (r"input_blocks\.(\d+)\.0\.", "down_blocks.{level}.resnets.{layer}.", 1),
    (r"input_blocks\.(\d+)\.1\.", "down_blocks.{level}.attentions.{layer}.", 1),
    (r"output_blocks\.(\d+)\.\d\.conv\.", "up_blocks.{level}.upsamplers.0.conv.", 0),
    (r"output_blocks\.(\d+)\.0\.", "up_blocks.{level}.resnets.{layer}.", 0),
    (r"output_blocks\.(\d+)\.1\.", "up_blocks.{level}.attentions.{layer}.", 0),
)
# (regular expression, today's spelling), all that match, in this order.
Spellings = tuple[tuple[str, str], ...]
UNET: Spellings = (
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)
VAE: Spellings = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
)
VAE_LINEAR = re.compile(r"\.mid\.attn_1\.([qkv]|proj_out)\.weight$")
OPEN_CLIP_TEXT: Spellings = (
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
# In a component, but no parameters that a Stable Diffusion model uses.
IGNORED = (
    r"^first_stage_model\.(loss\.|model_ema\.|logvar$)",  # of the autoencoder's own training
    rf"{OPEN_CLIP.pattern}(text_projection|logit_scale|attn_mask)$",
    rf"{OPEN_CLIP.pattern}transformer\.resblocks\.{UNUSED_LAYER}\.",
)
FUSED = re.compile(r"\.attn\.in_proj_(weight|bias)$")  # rows: query, key, value


@dataclass(frozen=True)
class Place:
    """Where an original file has a parameter of today."""

    name: str
    third: int | None = None
    """The first, second or last third of its rows; None for all of them."""
    is_linear: bool = False
    """A 1x1 convolution there, a linear layer today."""


def component_of(name: str) -> str | None:
    """The component that the array `name` belongs to; None for all else: schedules, averages."""
    if any(re.search(pattern, name) for pattern in IGNORED):
        return None
    return next((part for part, starts in PREFIXES.items() if name.startswith(starts)), None)


def places(component: str, names: Iterable[str]) -> dict[str, Place]:
    """Today's name of each parameter of `component` among the `names` of a file, and its place.

    Names that no table knows stay as they are after the prefix, to be told as unexpected.
    """
    theirs = {_without_prefix(name): name for name in names if component_of(name) == component}
    return {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}[component](theirs)


def _without_prefix(name: str) -> str:
    for start in (start for starts in PREFIXES.values() for start in starts):
        name = name.removeprefix(start)
    return name


def _unet(theirs: dict[str, str]) -> dict[str, Place]:
    """The first downsampler ends the first level, and tells how many blocks a level has."""
    downsamplers = (re.match(r"input_blocks\.(\d+)\.0\.op\.", short) for short in theirs)
    blocks_per_level = min((int(match[1]) for match in downsamplers if match), default=sys.maxsize)

    def today(short: str) -> str:
        for pattern, block, first in UNET_BLOCKS:
            match = re.match(pattern, short)
            if match and int(match[1]) >= first:
                level, layer = divmod(int(match[1]) - first, blocks_per_level)
                short = block.format(level=level, layer=layer) + short[match.end() :]
        return _spelt(short, UNET)

    return {today(short): Place(name) for short, name in theirs.items()}


def _vae(theirs: dict[str, str]) -> dict[str, Place]:
    """The decoder's levels are counted from the other end."""
    levels = re.compile(r"(?<=decoder\.up\.)\d+")
    last = max((int(found[0]) for found in map(levels.search, theirs) if found), default=0)

    def today(short: str) -> str:
        return _spelt(levels.sub(lambda found: str(last - int(found[0])), short), VAE)

    return {
        today(short): Place(name, is_linear=VAE_LINEAR.search(short) is not None)
        for short, name in theirs.items()
    }


def _text_encoder(theirs: dict[str, str]) -> dict[str, Place]:
    found = {}
    for short, name in theirs.items():
        if not OPEN_CLIP.match(name):
            current = current_name("text_encoder", short)
            found |= {} if current is None else {current: Place(name)}
        elif match := FUSED.search(short):
            stem = _spelt(short[: match.start()], OPEN_CLIP_TEXT)
            for third, letter in enumerate("qkv"):
                found[f"{stem}.self_attn.{letter}_proj.{match[1]}"] = Place(name, third)
        else:
            found[_spelt(short, OPEN_CLIP_TEXT)] = Place(name)
    return found


def _spelt(name: str, spellings: Spellings) -> str:
    for pattern, today in spellings:
        name = re.sub(pattern, today, name)
    return name
