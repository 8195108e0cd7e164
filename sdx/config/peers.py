"""What became of every key of MaxDiffusion and every argument of diffusers' text-to-image script.

One table with one outcome a name: the sdx key that does it, automatic, not supported because …, or
planned. It answers people who type the names they know, and it makes the migration table of the
documentation.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from sdx.config.leaves import leaves

MAXDIFFUSION = "MaxDiffusion"
DIFFUSERS = "diffusers"


class Outcome(Enum):
    key = "sdx key"
    automatic = "automatic"
    unsupported = "not supported"
    planned = "planned in a later version"


@dataclass(frozen=True)
class Row:
    """One peer's name. `target` is the sdx key or group, `note` a reason, `values` translates the
    peer's spellings: words are all that can be translated, numbers are exceptions.
    """

    name: str
    peers: tuple[str, ...]
    outcome: Outcome
    target: str | None = None
    note: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The outcome in one line, for the documentation."""
        if self.outcome is Outcome.key:
            remarks = "; ".join(part for part in (self.note, self._translations) if part)
            return f"`{self.target}`" + (f" ({remarks})" if remarks else "")
        target = f": `{self.target}`" if self.target else ""
        return self.outcome.value + target + (f": {self.note}" if self.note else "")

    @property
    def _translations(self) -> str:
        """Values that are spelled otherwise here."""
        pairs = (
            (theirs, ours) for theirs, ours in self.values.items() if theirs and ours != theirs
        )
        return ", ".join(f"{theirs} → {ours}" for theirs, ours in pairs)


def answer(name: str, got: str | None) -> tuple[str, str] | None:
    """What is wrong with typing `name`, and what to type instead; None for a name no peer has."""
    name, dot, below = name.lstrip("-").replace("-", "_").partition(".")
    row = TABLE.get(name)
    if row is None:
        return None
    rule = "a name of " + " and ".join(row.peers)
    note = f" ({row.note})" if row.note else ""
    match row.outcome:
        case Outcome.key if got in _EMPTY:
            return f"{rule}, empty there", "leave it out"
        case Outcome.key:
            value = got if below else _translated(row, got)
            typed = f"{row.target}{dot}{below}={value}"
            typed = shlex.quote(typed) if '"' in typed else typed  # a shell would take them away
            return rule, f"use {typed}{note}"
        case Outcome.automatic:
            return f"{rule}, automatic in sdx{note}", "leave it out"
        case Outcome.planned:
            return f"{rule}, planned for a later version as {row.target}{note}", "leave it out"
        case Outcome.unsupported:
            return f"{rule}, not supported: {row.note}", "leave it out"


_EMPTY = ("", "''", '""')  # how a YAML file leaves a key out
_OFF = ("-1", "-1.0")  # how MaxDiffusion switches off what is null here


def _translated(row: Row, got: str | None) -> str:
    typed = "true" if got is None else got
    if typed.lower() in row.values:
        return row.values[typed.lower()]
    if any(not _is_number(word) for word in row.values):
        return "…"
    leaf = leaves().get(row.target or "")
    return "null" if typed in _OFF and leaf is not None and leaf.optional else typed


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?[\d.]+", word) is not None


_Cell = str | tuple[str | None, str | None] | tuple[str, str | None, Mapping[str, str]]


def _rows(peers: tuple[str, ...], outcome: Outcome, names: Mapping[str, _Cell]) -> list[Row]:
    """Rows from `name: target` or `name: (target or None, note[, values])`."""
    rows = []
    for name, cell in names.items():
        cell = (cell, None) if isinstance(cell, str) else cell
        values = cell[2] if len(cell) == 3 else {}
        rows.append(Row(name, peers, outcome, cell[0], cell[1], values))
    return rows


_BOOL = {"true": "true", "false": "false"}
_DTYPES = {"fp16": "bfloat16", "bf16": "bfloat16", "no": "float32"}
_REMAT = {"true": "full", "false": "none"}
_DREAMBOOTH = (None, "sdx trains on captioned images, it has no DreamBooth loop")
_CONTROLNET = (None, "sdx trains the UNet of Stable Diffusion, no ControlNet")
_NO_QUANTIZATION = (
    None,
    "quantized training changes the mathematics; use model.weights_dtype=bfloat16",
)
_ENCODE = (None, "sdx.encode writes caches; tar files are read where they lie: data=webdataset")

_CONTEXT_PARALLEL = {
    place: (f"mesh.{place}.tensor", "with attention.shard_sequence=true; it is axis tensor here")
    for place in ("ici", "dcn")
}

_BOTH = _rows(
    (MAXDIFFUSION, DIFFUSERS),
    Outcome.key,
    {
        "output_dir": "run.output_dir",
        "pretrained_model_name_or_path": (
            "model.pretrained",
            "or choose model=sd21, sd15, …, which name repositories that still exist",
        ),
        "seed": "run.seed",
        "resolution": "data.resolution",
        "center_crop": "data.center_crop",
        "random_flip": "data.random_flip",
        "caption_column": "data.caption_column",
        "train_data_dir": ("data.dir", "with data=imagefolder"),
        "max_train_samples": "train.max_samples",
        "max_train_steps": "train.max_steps",
        "num_train_epochs": ("train.epochs", "with train.max_steps=null"),
        "learning_rate": "optimizer.lr",
        "scale_lr": "optimizer.scale_lr",
        "adam_weight_decay": "optimizer.weight_decay",
        "max_grad_norm": ("optimizer.max_grad_norm", "null = off"),
        "snr_gamma": ("diffusion.snr_gamma", "null = off"),
        "revision": ("model.revision", "not for a branch of Flax weights, such as bf16"),
        "dataset_name": (
            "data.name",
            "with data=huggingface; images on disk: data=imagefolder data.dir=FOLDER",
        ),
        "dataset_config_name": "data.config",
        "image_column": "data.image_column",
    },
)

_MAXDIFFUSION_KEYS = _rows(
    (MAXDIFFUSION,),
    Outcome.key,
    {
        "run_name": "run.name",
        "base_output_directory": "run.output_dir",
        "write_metrics": ("metrics.sinks", None, {"true": "[tensorboard,jsonl]", "false": "[]"}),
        "log_period": "metrics.every",
        "weights_dtype": "model.weights_dtype",
        "activations_dtype": "model.activations_dtype",
        "precision": (
            "model.matmul_precision",
            None,
            {"default": "default", "high": "high", "highest": "highest"},
        ),
        "norm_num_groups": "model.unet.norm_num_groups",
        "unet_checkpoint": "model.unet_checkpoint",
        "train_text_encoder": "train.text_encoder",
        "text_encoder_learning_rate": "optimizer.text_encoder_lr",
        "timestep_bias": (
            "diffusion.timestep_bias",
            "its keys one by one; the end of a range is inclusive",
            {"": "…"},
        ),
        "train_new_unet": ("model.init", None, {"true": "random", "false": "pretrained"}),
        "diffusion_scheduler_config": (
            "diffusion.prediction_type",
            "and the other diffusion.* keys",
            {"": "…"},
        ),
        "enable_single_replica_ckpt_restoring": "checkpoint.single_replica_restore",
        "dcn_data_parallelism": "mesh.dcn.data",
        "dcn_fsdp_parallelism": "mesh.dcn.fsdp",
        "dcn_tensor_parallelism": "mesh.dcn.tensor",
        "ici_data_parallelism": "mesh.ici.data",
        "ici_fsdp_parallelism": "mesh.ici.fsdp",
        "ici_tensor_parallelism": "mesh.ici.tensor",
        "ici_context_parallelism": _CONTEXT_PARALLEL["ici"],
        "dcn_context_parallelism": _CONTEXT_PARALLEL["dcn"],
        "train_split": "data.split",
        "dataset_type": (
            "data",
            "choose the source",
            {
                "tf": "huggingface",
                "hf": "huggingface",
                "grain": "arrayrecord",
                "synthetic": "shapes",
            },
        ),
        "jax_cache_dir": "run.compilation_cache_dir",
        "grain_worker_count": "data.num_workers",
        "tokenize_captions_num_proc": "data.num_workers",
        "transform_images_num_proc": "data.num_workers",
        "enable_data_shuffling": "data.shuffle",
        "reuse_example_batch": (
            "debug",
            "a few examples over and over",
            {"true": "overfit", "false": "null"},
        ),
        "checkpoint_every": ("checkpoint.every", "in steps; 0 = only at the end", {"-1": "0"}),
        "per_device_batch_size": "train.per_device_batch_size",
        "warmup_steps_fraction": (
            "lr_schedule.warmup_fraction",
            "with lr_schedule=constant_with_warmup, which is what it has",
            {"0": "null", "0.0": "null"},
        ),
        "learning_rate_schedule_steps": "lr_schedule.decay_steps",
        "remat_policy": ("train.remat", None, {"full": "full", "none": "none"}),
        "adam_b1": "optimizer.b1",
        "adam_b2": "optimizer.b2",
        "adam_eps": "optimizer.eps",
        "opt_enable_grad_global_norm_clipping": (
            "optimizer.max_grad_norm",
            "one switch, null = off",
            {"true": "1.0", "false": "null"},
        ),
        "prompt": ("sample.prompts", "a list", {"": "…"}),
        "negative_prompt": "sample.negative_prompt",
        "guidance_scale": "sample.guidance_scale",
        "guidance_rescale": "sample.guidance_rescale",
        "num_inference_steps": "sample.num_steps",
        "split_head_dim": "attention.split_head_dim",
        "flash_block_sizes": "attention.block_sizes",
        "flash_min_seq_length": "attention.min_sequence",
        "cache_latents_text_encoder_outputs": (
            "data.cache",
            "written by sdx.encode",
            {"true": "moments_and_context", "false": "none"},
        ),
        "dataset_save_location": "data.cache_dir",
        "hf_data_dir": ("data.dir", "with data=huggingface"),
        "hf_train_files": ("data.files", "with data=parquet"),
        "grain_train_files": ("data.files", "with data=arrayrecord"),
        "enable_profiler": ("profiler.enabled", None, _BOOL),
        "skip_first_n_steps_for_profiler": "profiler.skip_steps",
        "profiler_steps": "profiler.steps",
        # Names that are groups here; typing them chooses an option.
        "attention": "attention",
        "hardware": "hardware",
    },
)

_MAXDIFFUSION_REST = (
    _rows(
        (MAXDIFFUSION,),
        Outcome.automatic,
        {
            "tensorboard_dir": (None, "RUN/tensorboard"),
            "metrics_file": (None, "RUN/metrics.jsonl"),
            "gcs_metrics": (None, "metrics lie in the run folder"),
            "timing_metrics_file": (None, "step times are in RUN/metrics.jsonl"),
            "write_timing_metrics": (None, "step times are in RUN/metrics.jsonl"),
            "save_config_to_gcs": (None, "every run folder holds its config.yaml"),
            "from_pt": (None, "safetensors of diffusers are what is read"),
            "mask_padding_tokens": (
                None,
                "a kernel's own padding is always masked; attention.mask_padding_tokens is another"
                " thing",
            ),
            "attention_sharding_uniform": (
                None,
                "attention.shard_sequence splits self- and cross-attention alike",
            ),
            "jit_initializers": (None, "state is made sharded, under jit"),
            "skip_jax_distributed_system": (None, "it follows from hardware.num_hosts"),
            "data_files_pattern": _ENCODE,
            "extracted_files_dir": _ENCODE,
            "tfrecords_dir": _ENCODE,
            "no_records_per_shard": _ENCODE,
            "data_sharding": (None, "the batch is split over mesh data x fsdp"),
            "allow_split_physical_axes": (None, "the mesh is laid out to fit the topology"),
            "hf_access_token": (None, "read from HF_TOKEN or a login, never from a config"),
        },
    )
    + _rows(
        (MAXDIFFUSION,),
        Outcome.planned,
        {
            "compile_topology_num_slices": ("sdx.plan", "compiles for chips that are not here"),
        },
    )
    + _rows(
        (MAXDIFFUSION,),
        Outcome.unsupported,
        {
            "mesh_axes": (None, "the axes are data, fsdp and tensor; set mesh.ici.*, mesh.dcn.*"),
            "logical_axis_rules": (None, "sharding rules are a tested table in the code"),
            "opt_enable_grad_clipping": (
                None,
                "elementwise clipping turns the gradient; use optimizer.max_grad_norm",
            ),
            "max_grad_value": (
                None,
                "elementwise clipping turns the gradient; use optimizer.max_grad_norm",
            ),
            "enable_mllog": (None, "it serves MLPerf submissions only"),
            "instance_data_dir": _DREAMBOOTH,
            "instance_prompt": _DREAMBOOTH,
            "class_data_dir": _DREAMBOOTH,
            "class_prompt": _DREAMBOOTH,
            "prior_loss_weight": _DREAMBOOTH,
            "num_class_images": _DREAMBOOTH,
            "cache_dreambooth_dataset": _DREAMBOOTH,
            "controlnet_model_name_or_path": _CONTROLNET,
            "controlnet_from_pt": _CONTROLNET,
            "controlnet_conditioning_scale": _CONTROLNET,
            "controlnet_image": _CONTROLNET,
            "quantization": _NO_QUANTIZATION,
            "quantization_local_shard_count": _NO_QUANTIZATION,
            "use_qwix_quantization": _NO_QUANTIZATION,
            "enable_ml_diagnostics": (None, "it is a Google Cloud service; see metrics.sinks"),
            "profiler_gcs_path": (None, "traces lie in the run folder"),
            "enable_ondemand_xprof": (None, "it is a Google Cloud service"),
        },
    )
)

_DIFFUSERS_KEYS = _rows(
    (DIFFUSERS,),
    Outcome.key,
    {
        "prediction_type": "diffusion.prediction_type",
        "image_interpolation_mode": "data.interpolation",
        "train_batch_size": "train.per_device_batch_size",
        "dataloader_num_workers": "data.num_workers",
        "gradient_accumulation_steps": "train.gradient_accumulation",
        "gradient_checkpointing": ("train.remat", None, _REMAT),
        "mixed_precision": (
            "model.activations_dtype",
            "float16 would need loss scaling, bfloat16 does not",
            _DTYPES,
        ),
        "allow_tf32": (
            "model.matmul_precision",
            None,
            {"true": "default", "false": "highest"},
        ),
        "lr_scheduler": ("lr_schedule", None),
        "lr_warmup_steps": (
            "lr_schedule.warmup_steps",
            "with a schedule that warms up, such as lr_schedule=constant_with_warmup",
            {"0": "null"},
        ),
        "adam_beta1": "optimizer.b1",
        "adam_beta2": "optimizer.b2",
        "adam_epsilon": "optimizer.eps",
        "use_8bit_adam": (
            "optimizer",
            "no 8-bit Adam: its state is 2 bytes a weight (adamw 8, lion 4); adafactor's is 0.009",
            {"true": "adafactor", "false": "adamw"},
        ),
        "use_ema": ("train.ema", None, _BOOL),
        "variant": "model.variant",
        "dream_training": ("diffusion.dream", "a power; null = off", {"true": "1.0"}),
        "dream_detail_preservation": "diffusion.dream",
        "noise_offset": "diffusion.noise_offset",
        "input_perturbation": "diffusion.input_perturbation",
        "push_to_hub": ("export.push_to_hub", None, _BOOL),
        "hub_model_id": "export.hub_model_id",
        "validation_prompts": ("sample.prompts", "a list", {"": "…"}),
        "validation_prompt": ("sample.prompts", "a list", {"": "…"}),
        "validation_epochs": ("sample.every", "in steps", {"": "…"}),
        "checkpointing_steps": "checkpoint.every",
        "checkpoints_total_limit": ("checkpoint.keep", "at least 2"),
        "resume_from_checkpoint": (
            "run.resume_from",
            "the same command again continues by itself; this forks from another run",
            {"": "…"},
        ),
        "report_to": (
            "metrics.sinks",
            "tensorboard, jsonl, wandb or several of them",
            {
                "tensorboard": "[tensorboard,jsonl]",
                "wandb": "[wandb,jsonl]",
                "all": "[tensorboard,jsonl,wandb]",
            },
        ),
        "tracker_project_name": ("metrics.wandb.project", "of W&B; runs are named by run.name"),
    },
)

_DIFFUSERS_REST = (
    _rows(
        (DIFFUSERS,),
        Outcome.automatic,
        {
            "non_ema_revision": (None, "one UNet is read; both averages and raw weights are saved"),
            "cache_dir": (None, "HF_HOME says where downloads are kept"),
            "enable_xformers_memory_efficient_attention": (None, "attention=auto picks the kernel"),
            "foreach_ema": (None, "the average is fused into the step"),
            "logging_dir": (None, "RUN/tensorboard"),
            "local_rank": (None, "processes find each other"),
            "hub_token": (None, "read from HF_TOKEN or a login, never from a config"),
        },
    )
    + _rows(
        (DIFFUSERS,),
        Outcome.planned,
        {
            "rank": "adapter.rank",
        },
    )
    + _rows(
        (DIFFUSERS,),
        Outcome.unsupported,
        {
            "offload_ema": (
                None,
                "the average is updated inside the step; spread it with mesh=fsdp to save memory",
            ),
            "num_validation_images": (None, "one picture a prompt; repeat a prompt for more"),
        },
    )
)


TABLE: Mapping[str, Row] = {
    row.name: row
    for row in [
        *_BOTH,
        *_MAXDIFFUSION_KEYS,
        *_MAXDIFFUSION_REST,
        *_DIFFUSERS_KEYS,
        *_DIFFUSERS_REST,
    ]
}
