"""Rules of `attention.*`: which kernel runs where, and what it can compute."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from sdx.config import resolve
from sdx.config.check_mesh import mesh_sizes
from sdx.config.errors import Problem, any_of
from sdx.config.schema import AttentionKind, BlockSizesConfig, Config, Platform
from sdx.config.sizes import attended_levels, image_sizes, num_tokens

_LANES = 128  # of a TPU's vector unit
_ACCELERATED = {
    AttentionKind.cudnn: Platform.gpu,
    AttentionKind.flash: Platform.tpu,
    AttentionKind.splash: Platform.tpu,
}


def _attention_kernel(config: Config) -> AttentionKind:
    kind, platform = config.attention.kind, config.hardware.platform
    return resolve.AUTO_ATTENTION[platform] if kind is AttentionKind.auto else kind


def _has_kernel(config: Config) -> bool:
    return _attention_kernel(config) in _ACCELERATED


def _has_tiles(config: Config) -> bool:
    return _attention_kernel(config) in (AttentionKind.flash, AttentionKind.splash)


def _multiplies_heads(config: Config) -> bool:
    return _attention_kernel(config) is not AttentionKind.per_head


def tensor_size(config: Config) -> int | None:
    """Devices along mesh axis tensor; None where only the machine can say."""
    if sizes := mesh_sizes(config.mesh, config.hardware):
        return sizes.total[2]
    ici, dcn = config.mesh.ici.tensor, config.mesh.dcn.tensor
    return ici * dcn if min(ici, dcn) > 0 else None


NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "attention.min_sequence": (_has_kernel, "attention=flash, splash or cudnn"),
    "attention.shard_sequence": (
        lambda config: tensor_size(config) != 1,
        "mesh.ici.tensor above 1",
    ),
    "attention.split_head_dim": (_multiplies_heads, "attention=dot_product"),
    **{
        f"attention.block_sizes.{block.name}": (_has_tiles, "attention=flash or splash")
        for block in dataclasses.fields(BlockSizesConfig)
    },
}


def attention_problems(config: Config) -> Iterator[Problem]:
    """What the chosen kernel cannot do."""
    attention, hardware = config.attention, config.hardware
    kind, needs = attention.kind, _ACCELERATED.get(attention.kind)
    for block, size in dataclasses.asdict(attention.block_sizes).items():
        if size is not None and size % _LANES:
            rule = f"must be a multiple of {_LANES}, the lanes of a TPU"
            yield Problem(f"attention.block_sizes.{block}", str(size), rule)
    yield from _parts(config)
    if tensor := tensor_size(config):
        yield from sequence_problems(config, tensor)
    if needs is None:
        return
    if needs is not hardware.platform:
        rule = f"is a kernel for {needs.name}, hardware={hardware.name} is {hardware.platform.name}"
        yield Problem("attention.kind", kind.name, rule, "use attention=auto")
        return
    if config.hardware.simulate:
        return  # the kernel is not used
    dtype = resolve.activations_dtype(config)
    if kind is AttentionKind.cudnn and dtype != "bfloat16":
        rule = "attention=cudnn takes bfloat16"
        fix = "use model.activations_dtype=bfloat16, or attention=auto"
        yield Problem("model.activations_dtype", dtype, rule, fix)
    if kind is AttentionKind.cudnn:
        yield from _head_dims(config)


def sequence_problems(config: Config, tensor: int) -> Iterator[Problem]:
    """Lengths that `attention.shard_sequence` cannot split over `tensor` devices.

    The autoencoder's, over all latents, divides where any level's does.
    """
    if not config.attention.shard_sequence:
        return
    sizes, levels = image_sizes(config), attended_levels(config)
    lengths = {size: [num_tokens(config, size, level) for level in levels] for size in sizes}
    divisor = math.gcd(tensor, *(length for each in lengths.values() for length in each))
    possible = any_of(n for n in range(2, divisor + 1) if divisor % n == 0)
    smaller = f"a tensor axis of {possible}, or " if possible else ""
    fix = f"use {smaller}attention.shard_sequence=false"
    for (height, width), each in lengths.items():
        odd = [
            f"level {level} has {length}"
            for level, length in zip(levels, each, strict=True)
            if length % tensor
        ]
        if odd:
            rule = (
                f"mesh axis tensor={tensor} must divide the tokens of every level, of"
                f" {height}x{width} pixels {', '.join(odd)}"
            )
            yield Problem("attention.shard_sequence", "true", rule, fix)


def _parts(config: Config) -> Iterator[Problem]:
    """Tiles that are computed must divide tiles that are read."""
    sizes = config.attention.block_sizes
    for part, whole in (("block_kv_compute", "block_kv"), ("block_kv_dkv_compute", "block_kv_dkv")):
        small, large = getattr(sizes, part), getattr(sizes, whole)
        if small and large and large % small:
            rule = f"must divide attention.block_sizes.{whole}={large}"
            yield Problem(f"attention.block_sizes.{part}", str(small), rule)


def _head_dims(config: Config) -> Iterator[Problem]:
    """cuDNN's limit, which holds on every GPU, at the levels that are long enough for it."""
    unet, side = config.model.unet, resolve.resolution(config)
    levels = list(zip(unet.block_out_channels, unet.attention_head_dim, strict=False))
    for level in attended_levels(config):
        length = num_tokens(config, (side, side), level)
        if level >= len(levels) or length < config.attention.min_sequence:
            continue
        channels, heads = levels[level]
        head_dim = channels // max(heads, 1)
        if head_dim > resolve.CUDNN_HEAD_DIM or head_dim % resolve.CUDNN_HEAD_DIM_UNIT:
            rule = (
                f"takes head dims up to {resolve.CUDNN_HEAD_DIM} in steps of"
                f" {resolve.CUDNN_HEAD_DIM_UNIT}, level {level} has {head_dim} over {length} tokens"
            )
            fix = f"use attention=auto, or attention.min_sequence={length + 1}"
            yield Problem("attention.kind", "cudnn", rule, fix)
