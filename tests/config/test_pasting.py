"""A configuration of a peer, pasted: every line is answered at once, with what can be typed."""

import re
import shlex
from collections.abc import Sequence
from functools import cache

import pytest

from sdx.config.arguments import parse_arguments
from sdx.config.check import check, check_given
from sdx.config.compose import compose
from sdx.config.errors import ConfigError, Problem
from sdx.config.folders import CONF, group_options
from sdx.config.leaves import flatten
from sdx.config.overrides import inspect
from sdx.config.peers import DIFFUSERS, MAXDIFFUSION
from tests.config.quick import quick
from tests.config.test_peers import DIFFUSERS_ARGUMENTS, MAXDIFFUSION_KEYS

pytestmark = pytest.mark.fast

# base21.yml of MaxDiffusion at 7cfb8801 as KEY=VALUE, with what base_2_base.yml and base14.yml add.
MAXDIFFUSION_YAML = """
run_name=my_run
metrics_file=
write_metrics=True
timing_metrics_file=
write_timing_metrics=True
gcs_metrics=True
save_config_to_gcs=False
log_period=10000000000
pretrained_model_name_or_path=stabilityai/stable-diffusion-2-1
unet_checkpoint=
revision=bf16
from_pt=False
weights_dtype=float32
activations_dtype=bfloat16
precision=DEFAULT
jit_initializers=True
split_head_dim=True
attention=dot_product
flash_block_sizes={}
flash_min_seq_length=4096
mask_padding_tokens=True
attention_sharding_uniform=True
norm_num_groups=32
train_new_unet=False
train_text_encoder=False
text_encoder_learning_rate=4.25e-6
snr_gamma=-1.0
timestep_bias={strategy:none,multiplier:1.0,begin:0,end:1000,portion:0.25}
diffusion_scheduler_config={_class_name:'',prediction_type:'',rescale_zero_terminal_snr:False}
base_output_directory=
output_dir=sd-model-finetuned
tensorboard_dir=
hardware=tpu
skip_jax_distributed_system=False
mesh_axes=[data,fsdp,context,tensor]
logical_axis_rules=[[batch,data],[activation_batch,[data,fsdp]]]
data_sharding=[[data,fsdp,context,tensor]]
dcn_data_parallelism=-1
dcn_fsdp_parallelism=1
dcn_context_parallelism=1
dcn_tensor_parallelism=1
ici_data_parallelism=-1
ici_fsdp_parallelism=1
ici_context_parallelism=1
ici_tensor_parallelism=1
allow_split_physical_axes=False
dataset_name=diffusers/pokemon-gpt4-captions
train_split=train
dataset_type=tf
cache_latents_text_encoder_outputs=True
dataset_save_location=/tmp/pokemon-gpt4-captions_sd21
train_data_dir=
dataset_config_name=
jax_cache_dir=
hf_data_dir=
hf_train_files=
hf_access_token=
grain_train_files=
grain_worker_count=4
image_column=image
caption_column=text
resolution=768
center_crop=False
random_flip=False
tokenize_captions_num_proc=4
transform_images_num_proc=4
reuse_example_batch=False
enable_data_shuffling=True
checkpoint_every=-1
enable_single_replica_ckpt_restoring=False
learning_rate=1.e-7
scale_lr=False
max_train_samples=-1
max_train_steps=800
num_train_epochs=1
seed=0
per_device_batch_size=1
warmup_steps_fraction=0.1
learning_rate_schedule_steps=-1
adam_b1=0.9
adam_b2=0.999
adam_eps=1.e-8
adam_weight_decay=1.e-2
opt_enable_grad_clipping=False
max_grad_value=1.0
opt_enable_grad_global_norm_clipping=False
max_grad_norm=1.0
enable_profiler=False
skip_first_n_steps_for_profiler=1
profiler_steps=5
remat_policy=none
prompt='A magical castle in the middle of a forest'
negative_prompt='purple, red'
guidance_scale=7.5
guidance_rescale=0.0
num_inference_steps=30
enable_mllog=False
instance_data_dir=
instance_prompt=
class_data_dir=
class_prompt=
prior_loss_weight=1.0
num_class_images=100
cache_dreambooth_dataset=False
quantization=
quantization_local_shard_count=-1
use_qwix_quantization=False
compile_topology_num_slices=-1
data_files_pattern=
extracted_files_dir=
tfrecords_dir=
no_records_per_shard=1000
enable_ml_diagnostics=True
profiler_gcs_path=
enable_ondemand_xprof=True
controlnet_model_name_or_path=lllyasviel/sd-controlnet-canny
controlnet_from_pt=True
controlnet_conditioning_scale=0.5
controlnet_image=https://example.org/cat.png
"""
# Every argument of diffusers' train_text_to_image.py, and what its LoRA twin adds.
DIFFUSERS_LINE = """
--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --revision main
--variant=fp16 --non_ema_revision main --dataset_name=reach-vb/pokemon-blip-captions
--dataset_config_name default --train_data_dir data --image_column image --caption_column text
--max_train_samples 1000 --validation_prompts castle --output_dir=sd-pokemon-model --cache_dir cache
--seed 42 --resolution=512 --center_crop --random_flip --image_interpolation_mode lanczos
--train_batch_size=1 --num_train_epochs 100 --max_train_steps=15000
--gradient_accumulation_steps=4 --gradient_checkpointing --learning_rate=1e-05 --scale_lr
--lr_scheduler=constant --lr_warmup_steps=500 --snr_gamma 5.0 --dream_training
--dream_detail_preservation 1.0 --use_8bit_adam --allow_tf32 --use_ema --offload_ema --foreach_ema
--dataloader_num_workers 4 --adam_beta1 0.9 --adam_beta2 0.999 --adam_weight_decay 1e-2
--adam_epsilon 1e-08 --max_grad_norm=1 --push_to_hub --hub_token secret
--prediction_type epsilon --hub_model_id me/model --logging_dir logs --mixed_precision=fp16
--report_to tensorboard --local_rank -1 --checkpointing_steps 500 --checkpoints_total_limit 3
--resume_from_checkpoint latest --enable_xformers_memory_efficient_attention --noise_offset 0.05
--input_perturbation 0.1 --validation_epochs 5 --tracker_project_name text2image-fine-tune
--validation_prompt castle --num_validation_images 4 --rank 4
"""
PASTED = {MAXDIFFUSION: MAXDIFFUSION_YAML.strip().splitlines(), DIFFUSERS: DIFFUSERS_LINE.split()}
MODELS = {MAXDIFFUSION: "model=sd21", DIFFUSERS: "model=sd15"}
NAMES = {MAXDIFFUSION: MAXDIFFUSION_KEYS, DIFFUSERS: DIFFUSERS_ARGUMENTS}


def problems(arguments: Sequence[str]) -> list[Problem]:
    """What one command says to all of them."""
    parsed = parse_arguments(arguments)
    try:
        compose(parsed.overrides)
    except ConfigError as error:
        return [*parsed.problems, *error.problems]
    return parsed.problems


@cache
def answered(peer: str) -> dict[str, Problem]:
    """The answer to each name."""
    return {
        re.split(r"[ =]", problem.path.lstrip("-"))[0]: problem
        for problem in problems(PASTED[peer])
        if problem.rule.startswith("a name of")
    }


@pytest.mark.parametrize("peer", PASTED)
def test_every_line_is_answered_in_one_go(peer: str) -> None:
    ours = {*group_options([CONF])}  # some are names of groups here and mean the same
    assert [name for name in NAMES[peer] if name not in {*answered(peer), *ours}] == []


def test_what_yaml_writes_and_hydra_cannot_read_is_answered_as_well() -> None:
    """A text with a comma is a sweep to Hydra and a mapping with quoted names is not its grammar;
    what is shown for a text can be typed into a shell."""
    fixes = [
        problem.fix or ""
        for problem in problems(
            [
                "negative_prompt=purple, red",
                "prompt=A castle in the forest, artistic drawing",
                "timestep_bias={'strategy': 'none', 'begin': 0}",
            ]
        )
    ]
    assert fixes == [
        "use 'sample.negative_prompt=\"purple, red\"'",
        "use sample.prompts=… (a list)",
        "use diffusion.timestep_bias=… (its keys one by one; the end of a range is inclusive)",
    ]
    [typed] = shlex.split(fixes[0].removeprefix("use "))
    assert quick([typed]).sample.negative_prompt == "purple, red"
    assert [p.rule for p in problems(["run.seed=0,1", "run.nme=a,b"])] == ["several values"] * 2


def suggestions(peer: str) -> dict[str, str]:
    """What the answers say to type, by the peer's name, but for values that only the user knows."""
    written = {name: problem.fix or "" for name, problem in answered(peer).items()}
    typed = {name: re.match(r"use (\S+?=(?:'[^']*'|\S+))", fix) for name, fix in written.items()}
    return {name: found[1] for name, found in typed.items() if found and "…" not in found[1]}


def faults(*typed: str) -> list[Problem]:
    """What is wrong with a few overrides."""
    try:
        config = quick(typed)
    except ConfigError as error:
        return error.problems
    return [*check(config), *check_given(config, inspect(typed, [CONF]).keys)]


@pytest.mark.parametrize("peer", PASTED)
def test_what_is_suggested_can_be_typed(peer: str) -> None:
    """It is taken, or what else it needs is said."""
    refused = []
    for name, typed in suggestions(peer).items():
        for problem in faults(MODELS[peer], typed):
            if not re.search("needs|set it|wins", f"{problem.rule} {problem.fix}"):
                refused.append(f"{name}: {problem}")
    assert refused == []


# The command of diffusers' examples/text_to_image/README.md at 58eb52c0.
RECIPE = """
--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 --use_ema
--resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4
--gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1
--lr_scheduler=constant --lr_warmup_steps=0
"""


def test_a_whole_recipe_is_taken_as_it_is_translated() -> None:
    """And it is the one that sdx ships under its name."""
    typed = [
        p.fix.partition(" (")[0].removeprefix("use ") for p in problems(RECIPE.split()) if p.fix
    ]
    assert len(typed) == len(RECIPE.split()) and faults("model=sd15", *typed) == []
    shipped = flatten(quick(["experiment=diffusers_pokemon"]))
    translated = flatten(quick(["model=sd15", *typed]))
    keys = [text.partition("=")[0] for text in typed]
    paths = [path for key in keys for path in ([key] if key in shipped else [f"{key}.kind"])]
    differing = {path: translated[path] for path in paths if translated[path] != shipped[path]}
    assert differing == {}
