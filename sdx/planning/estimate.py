"""What a configuration holds, computes and asks of its hosts, without its hardware: in seconds.

Bytes of what lies on a device are exact (arrays.py), temporaries are estimated (activations.py,
temporaries.py), speeds are limits and a forecast (speed.py). No device is needed, nothing is
allocated or compiled, and neither data nor weights nor this machine are looked at.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp

from sdx.config import resolve
from sdx.config.schema import Cache, Config, Platform
from sdx.config.sizes import Size, image_sizes
from sdx.parallel.sharding import Placement, placement
from sdx.planning import arrays
from sdx.planning.arrays import Arrays
from sdx.planning.compiled import GIB
from sdx.planning.host import HostBytes, host_bytes
from sdx.planning.speed import Speed, Traffic, Work, speed_of, work_of
from sdx.planning.temporaries import Share, StepBytes, encode_bytes, step_bytes

MARGIN = 0.25
"""Share of the temporaries that the estimate may be wrong by."""
JAX_GPU_FRACTION = 0.75  # XLA_PYTHON_CLIENT_MEM_FRACTION's default (docs.jax.dev, GPU memory)
SHOWN_SIDES = (512, 768)

Fits = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class Parameters:
    """Numbers in each network, trained and frozen ones alike."""

    unet: int
    vae: int
    text_encoder: int


@dataclass(frozen=True)
class DeviceBytes:
    """What one device holds, as its platform stores it."""

    weights: int
    ema: int
    optimizer: int
    """Moments, and the counters of the state."""
    frozen: int
    placed: int
    """A batch that is trained on, and the next one, which is placed meanwhile."""
    encoded: int
    """What `encode` hands to `step`."""
    step: StepBytes
    """Estimated: temporaries of the update."""
    encode: int
    """Estimated: temporaries of encoding, which is over before the update begins."""

    @property
    def state(self) -> int:
        """What a step is given and gives back; exact."""
        return self.weights + self.ema + self.optimizer

    @property
    def inputs(self) -> int:
        """All that a batch takes."""
        return self.placed + self.encoded

    @property
    def resident(self) -> int:
        """What lies there all the time; exact."""
        return self.state + self.frozen + self.inputs

    @property
    def temporaries(self) -> int:
        """Of the program that needs more."""
        return max(self.step.total, self.encode)

    @property
    def total(self) -> int:
        """The most at a time."""
        return self.resident + self.temporaries


@dataclass(frozen=True)
class Estimate:
    """One configuration on the hardware it names."""

    config: Config
    held: Arrays = field(repr=False, compare=False)
    level: str
    """XLA's optimisation level that the temporaries are estimated for."""
    num_devices: int
    mesh: dict[str, int]
    """Size of each axis."""
    parameters: Parameters
    image: Size
    """Height and width of the largest training image."""
    global_batch_size: int
    device_bytes: DeviceBytes
    placement: Placement = field(repr=False)
    """How the state lies: the share that is split, and what every device holds whole."""
    work: Work
    speed: Speed
    host: HostBytes

    @property
    def sharded_share(self) -> float:
        """Share of the state's bytes in arrays of which a device holds only a part."""
        return self.placement.sharded_share

    @property
    def checkpoint_bytes(self) -> int:
        """The whole state, uncompressed."""
        return self.placement.total

    @property
    def per_device_batch_size(self) -> float:
        """Examples on each device in one micro-step, as in train.per_device_batch_size."""
        pieces = self.config.train.gradient_accumulation
        return self.global_batch_size / self.num_devices / pieces

    @property
    def usable_bytes(self) -> int | None:
        """What programs may have of a device's memory; None where the preset does not say."""
        return usable_bytes(self.config)

    @property
    def margin_bytes(self) -> int:
        """How far the temporaries may be off."""
        return int(MARGIN * self.device_bytes.temporaries)

    @cached_property
    def fits(self) -> Fits:
        """`no` where the estimate is too much, `undecided` where its margin or an unknown memory
        decides."""
        if self.usable_bytes is None:
            return "undecided"
        spare = self.usable_bytes - self.device_bytes.total
        if spare < 0:
            return "no"
        return "yes" if spare >= self.margin_bytes else "undecided"


def estimate(config: Config, level: str = "default") -> Estimate:
    """What `config` needs on `config.hardware`, temporaries as XLA makes them at `level`.

    Of buckets the largest counts. Raises ConfigError where the number of devices is not given, and
    BatchError where the batch does not split over them.
    """
    return complete(config, arrays.describe(config), level)


def complete(config: Config, held: Arrays, level: str) -> Estimate:
    """The estimate of `config`, whose state and frozen weights are known."""
    size = max(image_sizes(config), key=lambda side: side[0] * side[1])
    held = replace(held, batch=arrays.batch_of(config, held.mesh, held.global_batch_size, size))
    found = device_bytes(config, held, size, level)
    work = work_of(config, size)
    place = placement(held.state)
    networks = held.state.params | held.frozen
    return Estimate(
        config=config,
        held=held,
        level=level,
        num_devices=held.mesh.size,
        mesh=dict(held.mesh.shape),
        parameters=Parameters(**{name: arrays.count(one) for name, one in networks.items()}),
        image=size,
        global_batch_size=held.global_batch_size,
        device_bytes=found,
        placement=place,
        work=work,
        speed=speed_of(config, work, held.global_batch_size, held.mesh.size, _traffic(found)),
        host=host_bytes(
            config,
            networks=arrays.whole(networks),
            checkpoint=place.total,
            batch=arrays.whole(held.batch),
            num_devices=held.mesh.size,
        ),
    )


def at_side(found: Estimate, side: int) -> Estimate:
    """The same run on square images of that side."""
    data = replace(found.config.data, resolution=side, buckets=False)
    return complete(replace(found.config, data=data), found.held, found.level)


def usable_bytes(config: Config) -> int | None:
    """What programs may have of one device's memory."""
    hardware = config.hardware
    if hardware.hbm_gib is None:
        return None
    is_gpu = hardware.platform is Platform.gpu
    part = (config.xla.memory_fraction or JAX_GPU_FRACTION) if is_gpu else 1
    return int(hardware.hbm_gib * GIB * part)


def device_bytes(config: Config, held: Arrays, size: Size, level: str) -> DeviceBytes:
    """What one device holds for images of `size`."""
    platform, state = config.hardware.platform, held.state
    weights = arrays.on_a_device(state.params, platform)
    ema = arrays.on_a_device(state.ema, platform)
    share = _share(config, held)
    latents = (size[0] // resolve.vae_factor(config), size[1] // resolve.vae_factor(config))
    encodes = config.data.cache is Cache.none
    return DeviceBytes(
        weights=weights,
        ema=ema,
        optimizer=arrays.on_a_device(state, platform) - weights - ema,
        frozen=arrays.on_a_device(held.frozen, platform),
        placed=2 * arrays.on_a_device(held.batch, platform),
        encoded=_encoded_bytes(config, held, latents),
        step=step_bytes(config, latents, share, arrays.trained_weights(state), level),
        encode=encode_bytes(config, size, share, level) if encodes else 0,
    )


def _share(config: Config, held: Arrays) -> Share:
    images = held.global_batch_size / (held.mesh.shape["data"] * held.mesh.shape["fsdp"])
    return Share(
        micro_batch=images / config.train.gradient_accumulation,
        images=images,
        tensor=held.mesh.shape["tensor"],
    )


def _encoded_bytes(config: Config, held: Arrays, latents: tuple[int, int]) -> int:
    """Moments, and text states or, where the text encoder is trained, tokens."""
    model, rows = config.model, held.global_batch_size
    text, place = model.text_encoder, held.batch.weights.sharding

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32, sharding=place)

    moments = array(*latents, 2 * model.vae.latent_channels)
    width = () if config.train.text_encoder else (text.hidden_size,)
    captions = array(text.max_position_embeddings, *width)
    return arrays.on_a_device((moments, captions), config.hardware.platform)


def _traffic(held: DeviceBytes) -> Traffic:
    """What a device must move at least: state read and written, gradients and what is kept written
    and read, the frozen weights read."""
    return Traffic(
        once=2 * (held.state + held.step.gradients) + held.frozen, again=2 * held.step.activations
    )
