"""Names and layouts of parameters: ours and those in diffusers' and transformers' files.

Ours are the module paths of those libraries, with flax's leaf names and NHWC layouts; so three rows
per leaf name say all there is to say, both ways. Older files spell some modules differently; those
spellings are read, never written.
"""

import re
from dataclasses import dataclass

import numpy as np

from sdx.models.module import Path


@dataclass(frozen=True)
class Leaf:
    """How a parameter is spelt and laid out on both sides; the first row that matches holds."""

    torch: str  # regular expression on the torch name
    ours: str  # our leaf name
    to_torch: dict[int, tuple[int, ...]]  # number of dims -> transposition from ours


SAME_LAYOUT: dict[int, tuple[int, ...]] = {}
NORM = r"(^|[._])(norm\d?|layer_norm\d?|layernorm|layrnorm|group_norm|norm_out)"
LEAVES = (
    Leaf(r"\.bias$", "bias", SAME_LAYOUT),
    Leaf(NORM + r"\.weight$", "scale", SAME_LAYOUT),
    Leaf(r"(token|position)_embedding\.weight$", "embedding", SAME_LAYOUT),
    Leaf(r"\.weight$", "kernel", {2: (1, 0), 4: (3, 2, 0, 1)}),  # (in, out); HWIO
)

# Older spellings: (regular expression, what it is today). The text encoder's prefix was dropped by
# transformers 5.6; the VAE's attention was renamed by diffusers 0.12.
DIALECTS: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (),
    "vae": (
        (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
        (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
        (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
        (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ),
    "text_encoder": ((r"^text_model\.", ""),),
}
# In some files, and no part of what is computed: places 0, 1, 2, ... of the tokens, and what the
# whole CLIP does with its text states.
IGNORED = {"embeddings.position_ids", "text_projection.weight", "logit_scale"}

# Parameters that no module holds: their names have no leaf.
BARE = {"class_embedding"}


def current_name(component: str, name: str) -> str | None:
    """Today's spelling of a torch name found in a file; None for what is not read."""
    for pattern, replacement in DIALECTS[component]:
        name = re.sub(pattern, replacement, name)
    return None if name in IGNORED else name


def from_torch(name: str) -> Path:
    """Our path of the torch parameter `name`: `conv_in.weight` is `("conv_in", "kernel")`."""
    return (*name.split(".")[:-1], _leaf(name).ours)


def to_torch(path: Path) -> str:
    """The torch name of our parameter at `path`."""
    if path[-1] in BARE:
        return ".".join(path)
    leaf = {"bias": "bias"}.get(path[-1], "weight")
    return ".".join((*path[:-1], leaf))


def array_from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """`array` of the torch parameter `name` in our layout; a view."""
    order = _leaf(name).to_torch.get(array.ndim)
    return array if order is None else array.transpose(np.argsort(order))


def array_to_torch(path: Path, array: np.ndarray) -> np.ndarray:
    """Our parameter at `path` in torch's layout; a view."""
    order = _leaf(to_torch(path)).to_torch.get(array.ndim)
    return array if order is None else array.transpose(order)


def _leaf(name: str) -> Leaf:
    for leaf in LEAVES:
        if re.search(leaf.torch, name):
            return leaf
    return Leaf(name, name.split(".")[-1], SAME_LAYOUT)
