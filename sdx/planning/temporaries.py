"""What a step and an encoding hold on one device beside their arguments: XLA's temporaries.

The backward pass is walked from the last layer to the first: what the layers before have kept, the
arrays of the layer it is at, the gradients of those behind it. Its highest point is the estimate,
with a few coefficients fitted per optimisation level to programs that XLA compiled for a TPU v4
(docs/planning.md has the points, and those it was judged on).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdx.config.schema import Config, Remat
from sdx.planning.activations import FLOAT, Layer, encoding_bytes, text_layers, unet_layers


@dataclass(frozen=True)
class Habits:
    """How much more XLA holds than `activations` counts, fitted."""

    kept: float
    """Bytes for one that is kept for the backward pass."""
    passing: float
    """Bytes for one of a layer's own backward pass."""
    gradient: float
    """Bytes for a trained number of the device's share."""
    around: float
    """Bytes for a number of a layer's whole weights while it is at work: copies in the compute
    type, gathered where they are spread, and their gradient before that is spread."""
    waiting: float
    """Bytes for a number that lies on other devices: gradients of whole layers, and weights that
    were gathered, until the collective that they share."""
    encoding: float
    """Bytes for one of the autoencoder's largest arrays."""


HABITS: Mapping[str, Habits] = {
    "O0": Habits(kept=0.96, passing=1.0, gradient=2.0, around=2.0, waiting=0.6, encoding=1.4),
    "default": Habits(kept=0.93, passing=1.0, gradient=2.0, around=2.0, waiting=0.6, encoding=1.4),
}
"""By optimisation level; nothing was fitted at the others, which count as the default."""


@dataclass(frozen=True)
class Weights:
    """Trained numbers below one prefix of the parameters' paths."""

    on_device: float
    whole: float


@dataclass(frozen=True)
class Share:
    """What one device has of a step."""

    micro_batch: float
    """Examples in one pass through the network."""
    images: float
    """Examples that are encoded at once: a whole update's."""
    tensor: int


@dataclass(frozen=True)
class StepBytes:
    """Temporaries of an update on one device; its parts are not at their most at the same time."""

    total: int
    activations: int
    """What is kept for the backward pass when that begins."""
    gradients: int
    """All of them, when it ends; with accumulation the sum over micro-steps too."""


def step_bytes(
    config: Config,
    latents: tuple[int, int],
    share: Share,
    weights: Mapping[str, Weights],
    level: str,
) -> StepBytes:
    """Temporaries of `step` on one device; `weights` are the trained parameters by path."""
    habits, remat = HABITS.get(level, HABITS["default"]), config.train.remat
    layers = unet_layers(config, latents, share.tensor)
    if config.train.text_encoder:
        layers = [*text_layers(config, share.tensor), *layers]
    held = [_below(layer, weights) for layer in layers]
    total = sum(one.on_device for one in weights.values())
    whole = sum(one.whole for one in weights.values())
    behind, highest = habits.waiting * (whole - total), 0.0
    kept = [_kept(layer, remat) for layer in layers]
    for index in reversed(range(len(layers))):
        layer, own = layers[index], held[index]
        again = _recomputed(layers, index, remat)
        activations = habits.kept * (sum(kept[: index + 1]) + again)
        passing = habits.passing * layer.passing
        behind += habits.gradient * own.on_device
        around = habits.around * own.whole
        highest = max(highest, share.micro_batch * (activations + passing) + behind + around)
    summed = FLOAT * total if config.train.gradient_accumulation > 1 else 0.0
    gradients = habits.gradient * total + summed
    return StepBytes(
        total=int(max(highest + summed, gradients)),
        activations=int(habits.kept * share.micro_batch * sum(kept)),
        gradients=int(gradients),
    )


def encode_bytes(config: Config, image: tuple[int, int], share: Share, level: str) -> int:
    """Temporaries of `encode` on one device, where it encodes images."""
    habits = HABITS.get(level, HABITS["default"])
    return int(habits.encoding * share.images * encoding_bytes(config, image))


def _kept(layer: Layer, remat: Remat) -> float:
    match remat:
        case Remat.none:
            return layer.entry + layer.rest
        case Remat.dots:
            return layer.entry + layer.products
        case Remat.blocks | Remat.full:
            return layer.entry


def _recomputed(layers: Sequence[Layer], index: int, remat: Remat) -> float:
    """What the backward pass of a layer computes again before it begins."""
    layer = layers[index]
    if remat is Remat.none:
        return 0
    return layer.between if remat is Remat.dots else layer.rest


def _below(layer: Layer, weights: Mapping[str, Weights]) -> Weights:
    found = [one for path, one in weights.items() if path.startswith(layer.path)]
    return Weights(sum(one.on_device for one in found), sum(one.whole for one in found))
