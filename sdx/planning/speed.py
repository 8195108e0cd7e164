"""Work of a run, and how fast its hardware could do it: a roofline, and a forecast from what
others reached on such chips."""

from dataclasses import dataclass

from sdx.config import resolve
from sdx.config.schema import Cache, Config, Remat
from sdx.config.sizes import Size
from sdx.models import flops


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one image; attention's products included, norms not."""

    unet_forward: float
    vae: float
    """Encoding the image; 0 from a cache."""
    text_encoder: float
    """Forward, and backward where it is trained; 0 from a cache of text states."""
    unet_training: float
    """Forward and backward; DREAM's second forward included."""
    recomputed: float
    """What remat computes again: the hardware's work, no part of the model's."""

    @property
    def image(self) -> float:
        """The model's work for one image in one update, as MFU counts it."""
        return self.unet_training + self.vae + self.text_encoder

    @property
    def done(self) -> float:
        """What the hardware computes for one image."""
        return self.image + self.recomputed


@dataclass(frozen=True)
class Traffic:
    """Least bytes that one device moves to and from its memory in an update."""

    once: float
    again: float
    """In each micro-step."""


@dataclass(frozen=True)
class Anchor:
    """What somebody reached on a chip, training this UNet at 512 pixels from cached moments."""

    chip: str
    """In the name JAX has for it."""
    mfu: float
    source: str


@dataclass(frozen=True)
class Speed:
    """Images a second on all devices together; None where the preset does not say enough."""

    roofline: float | None
    """Compute at its peak, or memory at its bandwidth where that is slower: no run is faster."""
    bound_by: str | None
    """`compute` or `memory`."""
    forecast: float | None
    """At the MFU of `anchor`, where the roofline allows it."""
    anchor: Anchor | None


MEASURED = "MLPerf 4.1, 32 cached images a chip"
NOT_MEASURED = "assumed: nothing published for it"
ANCHORS = (
    Anchor("H100", 0.331, f"NVIDIA, 8 H100, {MEASURED}"),
    Anchor("H200", 0.331, f"as NVIDIA on 8 H100, {MEASURED}"),
    Anchor("A100", 0.280, "MosaicML, 8 A100, github.com/mosaicml/diffusion"),
    Anchor("TPU v5 lite", 0.40, NOT_MEASURED),
    Anchor("TPU v5", 0.455, f"Google MaxDiffusion, 8 v5p, {MEASURED}"),
    Anchor("TPU v6", 0.25, f"{NOT_MEASURED}, starved of bandwidth"),
    Anchor("TPU v4", 0.40, NOT_MEASURED),
    Anchor("TPU v3", 0.40, NOT_MEASURED),
)
"""The first whose chip is in the device's name counts."""


def work_of(config: Config, size: Size) -> Work:
    """The work of one image of that height and width."""
    model, cache = config.model, config.data.cache
    factor = resolve.vae_factor(config)
    unet = flops.unet_forward_flops(
        model.unet,
        size[0] // factor,
        size[1] // factor,
        num_tokens=model.text_encoder.max_position_embeddings,
    )
    text = flops.text_flops(model.text_encoder)
    once = 0.0 if cache is Cache.moments_and_context else text
    again = {Remat.none: 0.0, Remat.dots: 0.0, Remat.blocks: unet, Remat.full: 2 * unet}
    return Work(
        unet_forward=unet,
        vae=flops.vae_encode_flops(model.vae, *size) if cache is Cache.none else 0.0,
        text_encoder=3 * text if config.train.text_encoder else once,
        unet_training=(3 if config.diffusion.dream is None else 4) * unet,
        recomputed=again[config.train.remat],
    )


def speed_of(
    config: Config, work: Work, global_batch_size: int, num_devices: int, traffic: Traffic
) -> Speed:
    """How fast `num_devices` could do that work."""
    hardware, pieces = config.hardware, config.train.gradient_accumulation
    seconds: dict[str, float] = {}
    anchor = _anchor(hardware.device_kind)
    forecast = None
    if hardware.peak_tflops is not None:
        peak = hardware.peak_tflops * 1e12
        seconds["compute"] = work.done * global_batch_size / num_devices / peak
        if anchor is not None:
            forecast = num_devices * peak * anchor.mfu / work.done
    if hardware.hbm_gbps is not None:
        moved = traffic.once + pieces * traffic.again
        seconds["memory"] = moved / (hardware.hbm_gbps * 1e9)
    if "compute" not in seconds:
        return Speed(None, None, None, None)
    bound_by = max(seconds, key=lambda name: seconds[name])
    roofline = global_batch_size / seconds[bound_by]
    if forecast is not None and forecast > roofline:
        forecast = None  # a model whose traffic no MFU of large ones tells of
    return Speed(roofline, bound_by, forecast, None if forecast is None else anchor)


def _anchor(device_kind: str | None) -> Anchor | None:
    return next((one for one in ANCHORS if device_kind and one.chip in device_kind), None)
