"""Rules of `attention.*`: which kernel runs where, and what it can compute."""

import dataclasses
from collections.abc import Callable, Iterator

from sdx.config import resolve
from sdx.config.errors import Problem
from sdx.config.schema import AttentionKind, BlockSizesConfig, Config, DownBlock, Platform

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


NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "attention.min_sequence": (_has_kernel, "attention=flash, splash or cudnn"),
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
    if needs is None:
        return
    if needs is not hardware.platform:
        rule = f"is a kernel for {needs.name}, hardware={hardware.name} is {hardware.platform.name}"
        yield Problem("attention.kind", kind.name, rule, "use attention=auto")
        return
    dtype = resolve.activations_dtype(config)
    if kind is AttentionKind.cudnn and dtype != "bfloat16":
        rule = "attention=cudnn takes bfloat16"
        fix = "use model.activations_dtype=bfloat16, or attention=auto"
        yield Problem("model.activations_dtype", dtype, rule, fix)
    if kind is AttentionKind.cudnn:
        yield from _head_dims(config)


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
    unet, last = config.model.unet, len(config.model.unet.block_out_channels) - 1
    side = resolve.resolution(config) // resolve.vae_factor(config)
    levels = zip(unet.block_out_channels, unet.attention_head_dim, strict=False)
    for level, (channels, heads) in enumerate(levels):
        length = (side >> level) ** 2
        head_dim = channels // max(heads, 1)
        attends = level == last or unet.down_block_types[level] is DownBlock.CrossAttnDownBlock2D
        if not attends or length < config.attention.min_sequence:
            continue
        if head_dim > resolve.CUDNN_HEAD_DIM or head_dim % resolve.CUDNN_HEAD_DIM_UNIT:
            rule = (
                f"takes head dims up to {resolve.CUDNN_HEAD_DIM} in steps of"
                f" {resolve.CUDNN_HEAD_DIM_UNIT}, level {level} has {head_dim} over {length} tokens"
            )
            fix = f"use attention=auto, or attention.min_sequence={length + 1}"
            yield Problem("attention.kind", "cudnn", rule, fix)
