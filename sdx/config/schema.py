"""Every configuration key of sdx: type, default, unit, range and one line of help.

This file is the only place where a key is declared; YAML in `conf/` chooses values for these keys,
`reference.py` turns them into the configuration reference and the editors' JSON Schemas, `check.py`
holds the rules that span several keys and `identity.py` reads from the metadata which keys decide
the mathematics of a run.

Enum members are named as users type them (OmegaConf 2.3 matches names). Group fields of `Config`
are `MISSING`: a default factory would instantiate the group before its values are composed.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

SCHEMA_VERSION = 1
MAX_COUNT = 2**31 - 1  # steps are counted in int32
MAX_BATCH = 2**20  # examples; larger is a slip of the finger
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # OWNER/NAME, as a regular expression
MAX_SEED = 2**32 - 1  # JAX without 64-bit integers drops the bits above: 2**32 would draw as 0


class ResumePolicy(Enum):
    auto = "auto"
    never = "never"
    must = "must"


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


class WeightsDtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class ActivationsDtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class MatmulPrecision(Enum):
    default = "default"
    high = "high"
    highest = "highest"


class DownBlock(Enum):
    CrossAttnDownBlock2D = "CrossAttnDownBlock2D"
    DownBlock2D = "DownBlock2D"


class HiddenAct(Enum):
    gelu = "gelu"
    quick_gelu = "quick_gelu"


class AttentionKind(Enum):
    auto = "auto"
    dot_product = "dot_product"
    per_head = "per_head"
    flash = "flash"
    cudnn = "cudnn"
    splash = "splash"


class DataKind(Enum):
    shapes = "shapes"
    imagefolder = "imagefolder"
    huggingface = "huggingface"
    parquet = "parquet"
    webdataset = "webdataset"
    arrayrecord = "arrayrecord"
    plugin = "plugin"


class Cache(Enum):
    none = "none"
    moments = "moments"
    moments_and_context = "moments_and_context"


class Interpolation(Enum):
    nearest = "nearest"
    nearest_exact = "nearest_exact"
    bilinear = "bilinear"
    bicubic = "bicubic"
    box = "box"
    hamming = "hamming"
    lanczos = "lanczos"


class OptimizerKind(Enum):
    adamw = "adamw"
    adafactor = "adafactor"
    lion = "lion"


class LrScheduleKind(Enum):
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"


class PredictionType(Enum):
    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


class BetaSchedule(Enum):
    linear = "linear"
    scaled_linear = "scaled_linear"


class TimestepSpacing(Enum):
    leading = "leading"
    trailing = "trailing"
    linspace = "linspace"


class TimestepBias(Enum):
    none = "none"
    earlier = "earlier"
    later = "later"
    range = "range"


class SamplerKind(Enum):
    ddpm = "ddpm"
    ddim = "ddim"
    pndm = "pndm"
    euler = "euler"
    dpmpp_2m = "dpmpp_2m"


class SchedulerClass(Enum):
    """Classes of diffusers that scheduler_config.json may name; each is one of our samplers."""

    DDPMScheduler = "DDPMScheduler"
    DDIMScheduler = "DDIMScheduler"
    PNDMScheduler = "PNDMScheduler"
    EulerDiscreteScheduler = "EulerDiscreteScheduler"
    DPMSolverMultistepScheduler = "DPMSolverMultistepScheduler"


class Remat(Enum):
    none = "none"
    blocks = "blocks"
    dots = "dots"
    full = "full"


class Sink(Enum):
    tensorboard = "tensorboard"
    jsonl = "jsonl"
    wandb = "wandb"


class Platform(Enum):
    cpu = "cpu"
    gpu = "gpu"
    tpu = "tpu"


class OnResume(Enum):
    """What a changed value means when a run folder is continued: refuse, say so, or nothing."""

    forbidden = "forbidden"
    warn = "warn"
    free = "free"


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    identity: bool = True,
    on_resume: OnResume | None = None,
) -> Any:
    """A schema field: default, one line of help, and what checks, reference and identity need to
    know.

    `at_least`/`at_most` are inclusive bounds, `above`/`below` exclusive; `null` always passes a
    bound. `identity` says whether the key decides the mathematics of a run (DESIGN: identity).
    `on_resume` defaults to forbidden for identity keys and free for the others.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
        "identity": identity,
        "on_resume": on_resume or (OnResume.forbidden if identity else OnResume.free),
    }
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(help: str) -> Any:
    """A group of keys; missing until a YAML option of that group fills it."""
    return field(default=MISSING, metadata={"help": help})


@dataclass
class RunConfig:
    name: str | None = option(
        None, "Folder name of the run; null derives it from model, data and a hash.", identity=False
    )
    seed: int = option(
        0,
        "Seed of initial weights, noise, timesteps, data order and augmentation.",
        at_least=0,
        at_most=MAX_SEED,
    )
    output_dir: str = option("outputs", "Folder that run folders go into.", identity=False)
    tags: list[str] = option([], "Free words kept in the run's record.", identity=False)
    resume: ResumePolicy = option(
        ResumePolicy.auto,
        "auto continues from the newest valid checkpoint; never refuses an existing folder,"
        " must refuses to start anew.",
        identity=False,
    )
    resume_from: str | None = option(
        None,
        "RUN or RUN@STEP to fork from: start from its state under a new identity.",
    )
    compilation_cache_dir: str | None = option(
        "~/.cache/sdx/compilation",
        "Folder of compiled programs, so a second start compiles nothing; null = off.",
        identity=False,
    )


@dataclass
class UNetConfig:
    """Fields of diffusers' UNet2DConditionModel config.json, with its names."""

    sample_size: int = option(MISSING, "Native latent side.", unit="latent pixels", at_least=1)
    in_channels: int = option(4, "Channels of the noisy latents.", at_least=1)
    out_channels: int = option(4, "Channels of the prediction.", at_least=1)
    block_out_channels: list[int] = option(
        MISSING, "Channels of each resolution level, first to last."
    )
    layers_per_block: int = option(
        2, "ResNet blocks in each down level; an up level has one more.", at_least=1
    )
    down_block_types: list[DownBlock] = option(
        MISSING, "Kind of each down level; the up levels mirror it."
    )
    attention_head_dim: list[int] = option(
        MISSING,
        "Attention heads of each level (diffusers' legacy name: counts, not sizes).",
    )
    cross_attention_dim: int = option(MISSING, "Width of the text states.", at_least=1)
    use_linear_projection: bool = option(
        True, "Linear (2.x) or 1x1 convolution (1.x) around transformer blocks."
    )
    upcast_attention: bool = option(
        False, "Compute attention logits and softmax inputs in float32."
    )
    norm_num_groups: int = option(32, "GroupNorm groups.", at_least=1)
    norm_eps: float = option(1e-5, "GroupNorm epsilon of ResNet blocks and the output.", above=0)
    flip_sin_to_cos: bool = option(True, "Timestep embedding order: cosines first.")
    freq_shift: int = option(0, "Frequency shift of the timestep embedding.", at_least=0)


@dataclass
class VAEConfig:
    """Fields of diffusers' AutoencoderKL config.json, with its names."""

    in_channels: int = option(3, "Image channels.", at_least=1)
    out_channels: int = option(3, "Channels of decoded images.", at_least=1)
    latent_channels: int = option(4, "Latent channels; moments have twice as many.", at_least=1)
    block_out_channels: list[int] = option(
        MISSING, "Channels of each level; the factor is 2 to the levels minus one."
    )
    layers_per_block: int = option(
        2, "ResNet blocks in each encoder level; a decoder level has one more.", at_least=1
    )
    norm_num_groups: int = option(32, "GroupNorm groups.", at_least=1)
    scaling_factor: float = option(
        0.18215, "Latents are multiplied by this before diffusion.", above=0
    )

    @property
    def factor(self) -> int:
        """Pixels on one side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass
class TextEncoderConfig:
    """Fields of transformers' CLIPTextModel config.json, with its names."""

    vocab_size: int = option(49408, "Tokens in the vocabulary.", at_least=3)
    hidden_size: int = option(MISSING, "Width of the text states.", at_least=1)
    intermediate_size: int = option(MISSING, "Width of the feed-forward layers.", at_least=1)
    num_hidden_layers: int = option(MISSING, "Transformer layers.", at_least=1)
    num_attention_heads: int = option(MISSING, "Attention heads.", at_least=1)
    max_position_embeddings: int = option(77, "Tokens per caption.", unit="tokens", at_least=3)
    hidden_act: HiddenAct = option(
        HiddenAct.gelu, "Feed-forward activation: gelu (2.x) or quick_gelu (1.x)."
    )
    layer_norm_eps: float = option(1e-5, "LayerNorm epsilon.", above=0)


@dataclass
class ModelConfig:
    name: str = option(
        MISSING, "Name of the architecture; part of the run folder's name.", identity=False
    )
    pretrained: str = option(
        MISSING,
        "Weights: a diffusers-layout folder, an original .safetensors file, a Hub id, or `tiny` for"
        " the embedded model.",
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the Hub repository; null = its main branch."
    )
    variant: str | None = option(
        None, "Variant of the weight files, such as fp16; null = the plain ones."
    )
    unet_checkpoint: str | None = option(
        None,
        "A UNet alone to start from instead: its folder (config.json and weights), a .safetensors"
        " file, or an sdx run.",
    )
    from_files: bool = option(
        False,
        "Take architecture and prediction type from the files of `pretrained`, not from model=.",
        identity=False,
    )
    init: Init = option(
        Init.pretrained,
        "Start from the pretrained UNet, or from random weights (then it is not read).",
    )
    resolution: int = option(MISSING, "Native image side.", unit="pixels", at_least=8)
    prediction_type: PredictionType = option(
        MISSING, "What this model's UNet was trained to output."
    )
    weights_dtype: WeightsDtype = option(
        WeightsDtype.float32,
        "Storage type of trained weights, average and optimizer state; bfloat16 loses changes below"
        " 1/512 of a value.",
    )
    activations_dtype: ActivationsDtype = option(
        ActivationsDtype.auto, "Compute type; auto is bfloat16 on accelerators, float32 on CPU."
    )
    matmul_precision: MatmulPrecision = option(
        MatmulPrecision.default,
        "jax.lax.Precision of every product and convolution, attention included.",
    )
    unet: UNetConfig = group("The denoising UNet.")
    vae: VAEConfig = group("The image autoencoder.")
    text_encoder: TextEncoderConfig = group("The CLIP text encoder.")


@dataclass
class BlockSizesConfig:
    """Tiles of the Pallas kernels, with the names of JAX's splash attention; null = the kernel's
    own choice for the sequence."""

    block_q: int | None = option(
        None, "Queries in a tile.", unit="tokens", at_least=128, identity=False
    )
    block_kv: int | None = option(
        None, "Keys read into memory at once.", unit="tokens", at_least=128, identity=False
    )
    block_kv_compute: int | None = option(
        None, "Keys in a tile.", unit="tokens", at_least=128, identity=False
    )
    block_q_dkv: int | None = option(
        None, "block_q of the gradient of keys.", unit="tokens", at_least=128, identity=False
    )
    block_kv_dkv: int | None = option(
        None, "block_kv of the gradient of keys.", unit="tokens", at_least=128, identity=False
    )
    block_kv_dkv_compute: int | None = option(
        None,
        "block_kv_compute of the gradient of keys.",
        unit="tokens",
        at_least=128,
        identity=False,
    )
    block_q_dq: int | None = option(
        None, "block_q of the gradient of queries.", unit="tokens", at_least=128, identity=False
    )
    block_kv_dq: int | None = option(
        None, "block_kv of the gradient of queries.", unit="tokens", at_least=128, identity=False
    )


@dataclass
class AttentionConfig:
    kind: AttentionKind = option(
        AttentionKind.auto,
        "Attention kernel; auto picks by platform and length, and prints what it picked.",
        identity=False,
    )
    min_sequence: int = option(
        256,
        "Shorter sequences take plain attention whatever the kernel.",
        unit="tokens",
        at_least=1,
        identity=False,
    )
    shard_sequence: bool = option(
        False,
        "Split queries by length over mesh axis tensor; every device has all keys and values.",
        identity=False,
    )
    split_head_dim: bool = option(
        True,
        "Plain attention keeps heads as a dimension of their own; false folds them into the batch.",
        identity=False,
    )
    mask_padding_tokens: bool = option(
        False,
        "Cross-attention ignores tokens after end-of-text; true departs from what diffusers"
        " computes.",
    )
    block_sizes: BlockSizesConfig = field(
        default_factory=BlockSizesConfig,
        metadata={"help": "Tiles of the flash and splash kernels."},
    )


@dataclass
class DataConfig:
    kind: DataKind = option(MISSING, "Where examples come from.")
    name: str | None = option(None, "Dataset on the Hugging Face Hub, OWNER/NAME.")
    config: str | None = option(None, "Configuration of that dataset; null = its only one.")
    revision: str | None = option(
        None, "Branch, tag or commit of that dataset; null = its main branch."
    )
    dir: str | None = option(
        None, "Folder of the data; of a dataset on the Hub, a local copy of it.", unit="path"
    )
    files: str | None = option(
        None, "Which files of data.dir are read, as a pattern; null = all of the kind's."
    )
    plugin: str | None = option(
        None, "Source of data=plugin: a name in the entry-point group sdx.plugins."
    )
    options: dict[str, Any] = option({}, "What that source is made with, as it documents.")
    split: str = option(
        "train",
        "Split, or a part of one: train[:95%], train[1000:]. For imagefolder a folder of that name"
        " under data.dir, if there is one.",
    )
    image_column: str = option("image", "Column that holds the image.")
    caption_column: str = option("text", "Column that holds the caption, or a list of them.")
    num_examples: int | None = option(
        None, "Examples in one epoch of the procedural source.", at_least=1
    )
    resolution: int | None = option(
        None, "Side of training images; null = the model's own.", unit="pixels", at_least=8
    )
    center_crop: bool = option(True, "Crop the centre; false crops at a random place.")
    random_flip: bool = option(False, "Mirror half of the images left to right.")
    interpolation: Interpolation = option(Interpolation.lanczos, "Resampling filter of the resize.")
    shuffle: bool = option(True, "New order every epoch; false keeps the source's order.")
    caption_dropout: float = option(
        0.0,
        "Share of captions replaced by the empty one, for classifier-free guidance.",
        at_least=0,
        below=1,
    )
    max_bad_fraction: float = option(
        0.01,
        "Share of unreadable images past which the run stops.",
        at_least=0,
        at_most=1,
        identity=False,
    )
    max_pixels: int = option(
        40_000_000,
        "Larger images are refused before decoding; at most Pillow's own limit.",
        unit="pixels",
        at_least=1,
        at_most=89_478_485,
    )
    buckets: bool = option(
        False,
        "Batches of equal aspect ratio instead of square crops; one program is compiled for each.",
    )
    cache: Cache = option(
        Cache.none,
        "Train from what sdx.encode wrote: VAE moments and tokens, or text states too.",
        identity=False,
        on_resume=OnResume.warn,
    )
    cache_dir: str = option(
        "~/.cache/sdx/data",
        "Folder of caches, each in a folder named by its content; local, s3:// or gs://.",
        identity=False,
    )
    cache_views: int | None = option(
        None,
        "Crops and flips of each image that are cached; epochs take them in turn.",
        at_least=1,
    )
    num_workers: int = option(
        0, "Loader processes; 0 loads in threads of this process.", at_least=0, identity=False
    )
    worker_timeout_s: float = option(
        300.0,
        "The run stops when no batch came for so long.",
        unit="seconds",
        above=0,
        identity=False,
    )


@dataclass
class MeshAxes:
    data: int = option(
        -1, "Copies of the model, each on its share of the batch; -1 fills.", identity=False
    )
    fsdp: int = option(
        1,
        "Devices that share parameters and optimizer state; the batch is split over them too.",
        identity=False,
    )
    tensor: int = option(
        1, "Devices that share the width of attention and feed-forward layers.", identity=False
    )


@dataclass
class DcnAxes:
    """The same axes across the data-centre network: over slices of TPUs, over hosts of GPUs."""

    data: int = option(
        1, "Groups of slices or hosts with a copy of the model; -1 fills.", identity=False
    )
    fsdp: int = option(
        1, "Slices or hosts that share parameters and optimizer state; -1 fills.", identity=False
    )
    tensor: int = option(1, "Slices or hosts that share the width of layers.", identity=False)


@dataclass
class MeshConfig:
    ici: MeshAxes = group("Axis sizes within a slice, or within a host of GPUs.")
    dcn: DcnAxes = field(
        default_factory=DcnAxes, metadata={"help": "Axis sizes over slices, or over hosts of GPUs."}
    )


@dataclass
class HardwareConfig:
    name: str = option(MISSING, "Name of the preset.", identity=False)
    platform: Platform = option(MISSING, "JAX platform.", identity=False)
    device_kind: str | None = option(
        None, "Device name as JAX reports it; null = any.", identity=False
    )
    num_devices: int | None = option(
        None, "Devices in all; null = those found.", at_least=1, identity=False
    )
    num_hosts: int = option(1, "Hosts (JAX processes).", at_least=1, identity=False)
    hbm_gib: float | None = option(
        None,
        "Memory of one device that its driver has to give; null = unknown, nothing is said to fit.",
        unit="GiB",
        above=0,
        identity=False,
    )
    peak_tflops: float | None = option(
        None,
        "Dense bfloat16 peak of one device; null = unknown, no MFU is shown.",
        unit="TFLOP/s",
        above=0,
        identity=False,
    )
    num_slices: int = option(
        1,
        "TPU slices in all, joined by the data-centre network.",
        at_least=1,
        identity=False,
    )
    hbm_gbps: float | None = option(
        None, "Memory bandwidth of one device.", unit="GB/s", above=0, identity=False
    )
    host_memory_gib: float | None = option(
        None, "Memory of one host.", unit="GiB", above=0, identity=False
    )
    topology: str | None = option(
        None,
        "One slice in libtpu's words, as v4:2x2x4: what sdx.plan compile=true compiles for.",
        identity=False,
    )
    chip_config: str | None = option(
        None, "libtpu's chip configuration, as megacore; null = its default.", identity=False
    )
    chips_per_host: list[int] | None = option(
        None, "Chips of one host in each dimension of the topology.", identity=False
    )
    simulate: bool = option(
        False,
        "Rehearse on this machine: a process for each host, virtual CPU devices for its chips.",
        identity=False,
    )


@dataclass
class XlaConfig:
    """Compiler flags, set before JAX is imported."""

    flags: list[str] = option([], "Added to XLA_FLAGS, as --xla_NAME=VALUE.", identity=False)
    libtpu_args: list[str] = option(
        [], "Added to LIBTPU_INIT_ARGS, as --xla_NAME=VALUE.", identity=False
    )
    memory_fraction: float | None = option(
        None,
        "Share of a GPU's memory that JAX takes at its start; null = JAX's own, 0.75.",
        above=0,
        at_most=1,
        identity=False,
    )


@dataclass
class DistributedConfig:
    """How the processes of one run find each other; without the first three, from SLURM or the
    metadata of a TPU."""

    coordinator_address: str | None = option(
        None, "HOST:PORT of process 0; null = found by itself.", identity=False
    )
    num_processes: int | None = option(
        None, "Processes in all; null = found by itself.", at_least=1, identity=False
    )
    process_id: int | None = option(
        None, "Number of this process, from 0; null = found by itself.", at_least=0, identity=False
    )
    initialization_timeout_s: int = option(
        300,
        "How long the processes wait for each other.",
        unit="seconds",
        at_least=1,
        identity=False,
    )
    heartbeat_timeout_s: int = option(
        100,
        "A process that gave no sign of life for so long is dead, and the run ends.",
        unit="seconds",
        at_least=5,
        identity=False,
    )
    shutdown_timeout_s: int = option(
        30,
        "How long processes wait for each other at their end.",
        unit="seconds",
        at_least=1,
        identity=False,
    )


@dataclass
class OptimizerConfig:
    kind: OptimizerKind = option(MISSING, "Optimizer.")
    lr: float = option(MISSING, "Peak learning rate.", above=0, on_resume=OnResume.warn)
    b1: float = option(
        0.9,
        "Decay of the first moment (adamw); its share in the update (lion).",
        at_least=0,
        below=1,
        on_resume=OnResume.warn,
    )
    b2: float = option(
        0.999,
        "Decay of the second moment (adamw); of the only one (lion).",
        at_least=0,
        below=1,
        on_resume=OnResume.warn,
    )
    eps: float = option(
        1e-8, "Added outside the square root (adamw).", above=0, on_resume=OnResume.warn
    )
    weight_decay: float = option(
        1e-2, "Decoupled weight decay, on every parameter.", at_least=0, on_resume=OnResume.warn
    )
    max_grad_norm: float | None = option(
        1.0, "Clip the global gradient norm; null = off.", above=0, on_resume=OnResume.warn
    )
    text_encoder_lr: float | None = option(
        None,
        "Peak learning rate of the text encoder; null = lr.",
        above=0,
        on_resume=OnResume.warn,
    )
    scale_lr: bool = option(
        False, "Multiply the learning rate by the global batch size.", on_resume=OnResume.warn
    )


@dataclass
class LrScheduleConfig:
    kind: LrScheduleKind = option(
        MISSING, "Shape of the schedule after warm-up.", on_resume=OnResume.warn
    )
    warmup_steps: int | None = option(
        None, "Linear warm-up from 0.", unit="steps", at_least=0, on_resume=OnResume.warn
    )
    warmup_fraction: float | None = option(
        None,
        "Warm-up as a share of the decay steps; give this or warmup_steps.",
        at_least=0,
        below=1,
        on_resume=OnResume.warn,
    )
    decay_steps: int | None = option(
        None,
        "Steps until the end of the decay; null = train.max_steps.",
        unit="steps",
        at_least=1,
        on_resume=OnResume.warn,
    )
    num_cycles: int = option(
        1, "Restarts of cosine_with_restarts.", at_least=1, on_resume=OnResume.warn
    )
    power: float = option(1.0, "Exponent of polynomial.", above=0, on_resume=OnResume.warn)
    end_lr: float = option(1e-7, "Final rate of polynomial.", at_least=0, on_resume=OnResume.warn)


@dataclass
class TimestepBiasConfig:
    """Which timesteps are drawn more often, or less."""

    strategy: TimestepBias = option(
        TimestepBias.none,
        "Timesteps that are biased: the first or last `portion` of the schedule, or a range.",
    )
    multiplier: float = option(
        1.0, "How often a biased timestep is drawn, against 1 for the others.", above=0
    )
    begin: int = option(0, "First timestep of the range.", unit="timesteps", at_least=0)
    end: int = option(999, "Last timestep of the range, inclusive.", unit="timesteps", at_least=0)
    portion: float = option(
        0.25, "Share of the schedule that earlier and later bias.", above=0, at_most=1
    )


@dataclass
class DiffusionConfig:
    prediction_type: PredictionType | None = option(
        None, "What the UNet learns to output; null = the model's own."
    )
    num_train_timesteps: int = option(
        1000, "Length of the noise schedule.", unit="timesteps", at_least=2
    )
    beta_schedule: BetaSchedule = option(
        BetaSchedule.scaled_linear, "How beta grows between its ends."
    )
    beta_start: float = option(0.00085, "First beta.", above=0, below=1)
    beta_end: float = option(0.012, "Last beta.", above=0, below=1)
    timestep_spacing: TimestepSpacing = option(
        TimestepSpacing.leading,
        "How samplers choose timesteps (diffusers' names).",
        on_resume=OnResume.warn,
    )
    rescale_zero_terminal_snr: bool = option(
        False, "Rescale betas so that the last timestep is pure noise (Lin et al. 2023)."
    )
    class_name: SchedulerClass | None = option(
        None,
        "diffusers' scheduler class: picks the sampler, and is what the export names; null = that"
        " of sampler=.",
        identity=False,
    )
    snr_gamma: float | None = option(
        None, "Min-SNR loss weighting; 5 is usual, null = off.", above=0
    )
    timestep_bias: TimestepBiasConfig = field(
        default_factory=TimestepBiasConfig,
        metadata={"help": "Which timesteps are drawn more often."},
    )
    noise_offset: float = option(
        0.0,
        "Share of a random shift of each channel added to the noise; 0.05 to 0.1 is usual.",
        at_least=0,
    )
    input_perturbation: float = option(
        0.0,
        "Share of extra noise in the input that the target does not know; 0.1 is usual.",
        at_least=0,
    )
    dream: float | None = option(
        None,
        "DREAM training of epsilon models: the power that preserves detail, 1 is usual; null ="
        " off.",
        at_least=0,
    )


@dataclass
class TrainConfig:
    max_steps: int | None = option(
        None,
        "Update attempts in all; wins over epochs.",
        unit="steps",
        at_least=1,
        at_most=MAX_COUNT,
        identity=False,
    )
    epochs: int | None = option(
        None, "Passes over the data, if max_steps is null.", at_least=1, identity=False
    )
    max_samples: int | None = option(None, "Use only the first N examples; null = all.", at_least=1)
    per_device_batch_size: float | None = option(
        None,
        "Examples on each device in one micro-step; a fraction where the mesh makes it whole.",
        unit="examples",
        above=0,
        at_most=MAX_BATCH,
        identity=False,
    )
    global_batch_size: int | None = option(
        None,
        "Examples in one update; null = per_device_batch_size x devices x gradient_accumulation.",
        unit="examples",
        at_least=1,
        at_most=MAX_BATCH,
    )
    gradient_accumulation: int = option(
        1, "Micro-steps in one update.", at_least=1, at_most=MAX_BATCH, identity=False
    )
    remat: Remat = option(
        Remat.none, "What the backward pass recomputes to save memory.", identity=False
    )
    ema: bool = option(
        True,
        "Keep an exponential moving average of the weights; it is what is sampled and exported.",
    )
    ema_decay: float = option(
        0.9999, "Largest decay of the average, reached by diffusers' warm-up.", at_least=0, below=1
    )
    text_encoder: bool = option(False, "Train the text encoder too, at optimizer.text_encoder_lr.")
    max_bad_steps: int = option(
        10,
        "Non-finite updates in a row before the run stops.",
        unit="steps",
        at_least=1,
        identity=False,
    )


@dataclass
class SamplerConfig:
    kind: SamplerKind = option(MISSING, "Sampler of grids and sdx.sample.", identity=False)


@dataclass
class SampleConfig:
    prompts: list[str] = option([], "Prompts of the grids drawn while training.", identity=False)
    negative_prompt: str = option("", "What guidance steers away from.", identity=False)
    guidance_scale: float = option(
        7.5, "Classifier-free guidance; 1 = off.", at_least=1, identity=False
    )
    guidance_rescale: float = option(
        0.0,
        "Share by which guidance keeps the contrast of the unguided prediction; 0.7 is usual with"
        " zero terminal SNR.",
        at_least=0,
        at_most=1,
        identity=False,
    )
    num_steps: int = option(30, "Sampler steps.", unit="steps", at_least=1, identity=False)
    every: int | None = option(
        0,
        "Draw a grid every N steps; 0 = only at the end, null = never.",
        unit="steps",
        at_least=0,
        identity=False,
    )
    seed: int = option(
        0, "Seed of the initial latents.", at_least=0, at_most=MAX_SEED, identity=False
    )
    num_adherence_prompts: int | None = option(
        None,
        "Held-out prompts judged at the end of a shapes run; null = off.",
        at_least=1,
        identity=False,
    )


@dataclass
class CheckpointConfig:
    every: int | None = option(
        500,
        "Save every N steps; 0 = only at the end, null = never.",
        unit="steps",
        at_least=0,
        identity=False,
    )
    every_minutes: float | None = option(
        None, "Save every N minutes as well.", unit="minutes", above=0, identity=False
    )
    keep: int = option(3, "Newest checkpoints kept.", at_least=2, identity=False)
    keep_best: int | None = option(
        None,
        "Checkpoints of lowest validation loss kept beside those; null = none.",
        at_least=1,
        identity=False,
    )
    single_replica_restore: bool = option(
        False,
        "Read a checkpoint once, by the devices of one copy of the model, which send it on.",
        identity=False,
    )


@dataclass
class ExportConfig:
    at_end: bool = option(
        True,
        "Write RUN/export, a folder diffusers loads, when the run is finished; off in a sweep"
        " unless typed.",
        identity=False,
    )
    push_to_hub: bool = option(
        False, "Upload that folder to the Hub at the end of the run.", identity=False
    )
    hub_model_id: str | None = option(
        None, "OWNER/NAME of the repository to upload to.", identity=False
    )


@dataclass
class EvalConfig:
    """Validation loss while training: examples, noise and timesteps are the same every time."""

    every: int | None = option(
        None,
        "Measure it every N steps; 0 = only at the end, null = never.",
        unit="steps",
        at_least=0,
        identity=False,
    )
    split: str = option(
        "validation", "Held-out split, or a part of one such as train[95%:].", identity=False
    )
    num_batches: int | None = option(
        None,
        "Global batches of it that are measured; null = all.",
        at_least=1,
        identity=False,
    )
    num_buckets: int = option(
        10,
        "Equal parts of the noise schedule whose losses are shown apart.",
        at_least=1,
        identity=False,
    )


@dataclass
class ProfilerConfig:
    """A trace of some steps of this start, which TensorBoard's profile plugin opens."""

    enabled: bool = option(False, "Trace steps into RUN/profile.", identity=False)
    skip_steps: int = option(
        2, "Steps of this start before the trace.", unit="steps", at_least=1, identity=False
    )
    steps: int = option(5, "Steps traced.", unit="steps", at_least=1, identity=False)


@dataclass
class WandbConfig:
    project: str = option("sdx", "Project at Weights & Biases.", identity=False)
    entity: str | None = option(None, "Team or user; null = your own.", identity=False)


@dataclass
class MetricsConfig:
    every: int = option(
        10, "Write metrics every N steps.", unit="steps", at_least=1, identity=False
    )
    sinks: list[Sink] = option([Sink.tensorboard, Sink.jsonl], "Where metrics go.", identity=False)
    wandb: WandbConfig = field(
        default_factory=WandbConfig, metadata={"help": "Where at Weights & Biases."}
    )


@dataclass
class Config:
    """One training run, whole. Groups are filled by `conf/`; the rest by the defaults here."""

    model: ModelConfig = group("What is trained.")
    data: DataConfig = group("What it is trained on.")
    optimizer: OptimizerConfig = group("How weights are updated.")
    lr_schedule: LrScheduleConfig = group("How the learning rate changes.")
    diffusion: DiffusionConfig = group("Noise schedule and loss.")
    attention: AttentionConfig = group("Attention kernels.")
    mesh: MeshConfig = group("How devices share the work.")
    hardware: HardwareConfig = group("Where it runs.")
    xla: XlaConfig = field(default_factory=XlaConfig, metadata={"help": "Compiler flags."})
    sampler: SamplerConfig = group("How pictures are drawn.")
    run: RunConfig = field(
        default_factory=RunConfig, metadata={"help": "Identity and place of everything written."}
    )
    train: TrainConfig = field(
        default_factory=TrainConfig, metadata={"help": "Length, batch and state of training."}
    )
    sample: SampleConfig = field(
        default_factory=SampleConfig, metadata={"help": "Pictures drawn while training."}
    )
    checkpoint: CheckpointConfig = field(
        default_factory=CheckpointConfig, metadata={"help": "When state is saved."}
    )
    export: ExportConfig = field(
        default_factory=ExportConfig, metadata={"help": "Weights out, in diffusers' layout."}
    )
    metrics: MetricsConfig = field(
        default_factory=MetricsConfig, metadata={"help": "What is measured, and where it goes."}
    )
    eval: EvalConfig = field(
        default_factory=EvalConfig, metadata={"help": "Validation loss on held-out data."}
    )
    profiler: ProfilerConfig = field(
        default_factory=ProfilerConfig, metadata={"help": "A trace of some steps."}
    )
    distributed: DistributedConfig = field(
        default_factory=DistributedConfig, metadata={"help": "How processes find each other."}
    )
    schema_version: int = option(
        SCHEMA_VERSION, "Version of this schema, for migrations.", identity=False
    )
