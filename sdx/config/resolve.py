"""Values that follow from several keys, each a function of the configuration.

Nothing here looks at the machine: what only the machine knows (devices found, examples in a folder)
is handed in.
"""

import dataclasses
import math

from sdx.config.schema import (
    ActivationsDtype,
    AttentionConfig,
    AttentionKind,
    Config,
    DataKind,
    LrScheduleKind,
    Platform,
    PredictionType,
    SamplerKind,
    SchedulerClass,
)
from sdx.config.splits import parse_split

DECAYING = {
    LrScheduleKind.linear,
    LrScheduleKind.cosine,
    LrScheduleKind.cosine_with_restarts,
    LrScheduleKind.polynomial,
}

AUTO_ATTENTION = {
    Platform.cpu: AttentionKind.per_head,
    Platform.gpu: AttentionKind.cudnn,
    Platform.tpu: AttentionKind.flash,
}
CUDNN_HEAD_DIM, CUDNN_HEAD_DIM_UNIT = 128, 8  # 256 from Hopper on, which is not known beforehand

SAMPLER_OF_CLASS = {
    SchedulerClass.DDPMScheduler: SamplerKind.ddpm,
    SchedulerClass.DDIMScheduler: SamplerKind.ddim,
    SchedulerClass.PNDMScheduler: SamplerKind.pndm,
    SchedulerClass.EulerDiscreteScheduler: SamplerKind.euler,
    SchedulerClass.DPMSolverMultistepScheduler: SamplerKind.dpmpp_2m,
}


def sampler_kind(config: Config) -> SamplerKind:
    """How pictures are drawn; diffusers' name in `diffusion.class_name` wins."""
    named = config.diffusion.class_name
    return config.sampler.kind if named is None else SAMPLER_OF_CLASS[named]


def resolution(config: Config) -> int:
    """Side of training images and of drawn pictures, in pixels."""
    return config.data.resolution or config.model.resolution


def prediction_type(config: Config) -> PredictionType:
    """What the UNet learns to output."""
    return config.diffusion.prediction_type or config.model.prediction_type


def platform(config: Config) -> Platform:
    """What computes: the CPU of this machine where the hardware is only rehearsed."""
    return Platform.cpu if config.hardware.simulate else config.hardware.platform


def attention(config: Config) -> AttentionConfig:
    """How attention is computed; in a rehearsal no kernel that this machine has no chips for."""
    kernels = (AttentionKind.flash, AttentionKind.splash, AttentionKind.cudnn)
    if config.hardware.simulate and config.attention.kind in kernels:
        return dataclasses.replace(config.attention, kind=AttentionKind.auto)
    return config.attention


def activations_dtype(config: Config) -> str:
    """Compute type: `float32` or `bfloat16`. A rehearsal computes what a CPU would, in float32: its
    losses are to be compared, and bfloat16 shares no array out differently."""
    chosen = config.model.activations_dtype
    if chosen is ActivationsDtype.auto:
        return "float32" if platform(config) is Platform.cpu else "bfloat16"
    return chosen.name


def without_place(config: Config) -> Config:
    """`config` as it is for every process of a run, and for its next start."""
    shared = dataclasses.replace(
        config.distributed, coordinator_address=None, num_processes=None, process_id=None
    )
    return dataclasses.replace(config, distributed=shared)


def vae_factor(config: Config) -> int:
    """Pixels on one side of a latent."""
    return config.model.vae.factor


def unet_factor(config: Config) -> int:
    """Latents on one side of the UNet's lowest level."""
    return 2 ** (len(config.model.unet.block_out_channels) - 1)


def global_batch_size(config: Config, num_devices: int | None = None) -> int:
    """Examples in one update.

    `num_devices` is what the machine has, for presets that do not say (bare `gpu` and `tpu`).
    Raises ValueError where the number is unknown or not whole; `check` reports both beforehand.
    """
    train = config.train
    if train.global_batch_size is not None:
        return train.global_batch_size
    devices = num_devices or config.hardware.num_devices
    if devices is None:
        raise ValueError(
            f"train.global_batch_size: missing, hardware={config.hardware.name} does not say how"
            " many devices there are; set it or hardware.num_devices."
        )
    if train.per_device_batch_size is None:
        raise ValueError("train.per_device_batch_size: missing; set it or train.global_batch_size.")
    size = train.per_device_batch_size * devices * train.gradient_accumulation
    if not 1 <= size < math.inf or not math.isclose(size, round(size), abs_tol=1e-6):
        raise ValueError(
            f"train.per_device_batch_size={train.per_device_batch_size:g}: times {devices} devices"
            f" and {train.gradient_accumulation} micro-steps is {size:g}, not a whole number."
        )
    return round(size)


def with_global_batch(config: Config, num_devices: int | None = None) -> Config:
    """`config` with its global batch written down and the per-device size left to follow from it.

    This is the form that is saved and resumed, so that other hardware keeps the batch.
    """
    size = global_batch_size(config, num_devices)
    train = dataclasses.replace(config.train, global_batch_size=size, per_device_batch_size=None)
    return dataclasses.replace(config, train=train)


def num_examples(config: Config) -> int | None:
    """Examples in one epoch where the configuration alone decides; None where the data does."""
    if config.data.kind is not DataKind.shapes or config.data.num_examples is None:
        return None
    try:
        examples = len(parse_split(config.data.split).rows(config.data.num_examples))
    except ValueError:
        return None  # `check` says so
    return min(examples, config.train.max_samples or examples)


def max_steps(
    config: Config,
    num_examples: int,
    num_devices: int | None = None,
    *,
    steps_per_epoch: int | None = None,
) -> int:
    """Update attempts in all; `num_examples` is the source before `train.max_samples`.

    `steps_per_epoch` is given where batches end with an epoch, as those of buckets do.
    """
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    if train.epochs is None:
        raise ValueError("train.max_steps: missing; set it or train.epochs.")
    if steps_per_epoch is not None:
        return max(1, math.ceil(train.epochs * steps_per_epoch))
    examples = min(num_examples, train.max_samples or num_examples)
    return max(1, math.ceil(train.epochs * examples / global_batch_size(config, num_devices)))


def decay_steps(config: Config, max_steps: int) -> int:
    """Steps until the learning rate has decayed."""
    return config.lr_schedule.decay_steps or max_steps


def warmup_steps(config: Config, max_steps: int) -> int:
    """Steps of linear warm-up from 0; a fraction counts from the decay steps."""
    schedule = config.lr_schedule
    if schedule.kind is LrScheduleKind.constant:
        return 0
    if schedule.warmup_fraction is not None:
        return int(schedule.warmup_fraction * decay_steps(config, max_steps))
    return schedule.warmup_steps or 0


def learning_rate(config: Config, global_batch_size: int) -> float:
    """Peak learning rate, scaled by the batch where `optimizer.scale_lr` asks for it."""
    optimizer = config.optimizer
    return optimizer.lr * global_batch_size if optimizer.scale_lr else optimizer.lr


def text_encoder_share(config: Config) -> float:
    """The text encoder's learning rate as a share of the UNet's, at every step."""
    optimizer = config.optimizer
    return (optimizer.text_encoder_lr or optimizer.lr) / optimizer.lr


def num_adherence_prompts(config: Config) -> int:
    """Held-out prompts judged at the end; 0 where pictures are off or the data has no judge."""
    if config.sample.every is None or config.data.kind is not DataKind.shapes:
        return 0
    return config.sample.num_adherence_prompts or 0
