"""Every key and argument of the peers has one outcome, and the sdx keys it names exist."""

import pytest

from sdx.config.folders import CONF, group_options
from sdx.config.leaves import groups, leaves
from sdx.config.peers import DIFFUSERS, MAXDIFFUSION, TABLE, Outcome, Row, answer

pytestmark = pytest.mark.fast

# The keys of MaxDiffusion's base21.yml, base_2_base.yml and base14.yml at 7cfb8801.
MAXDIFFUSION_KEYS = """
run_name output_dir base_output_directory tensorboard_dir metrics_file write_metrics gcs_metrics
log_period timing_metrics_file write_timing_metrics save_config_to_gcs pretrained_model_name_or_path
unet_checkpoint revision from_pt weights_dtype activations_dtype precision jit_initializers
split_head_dim attention flash_block_sizes mask_padding_tokens attention_sharding_uniform
norm_num_groups train_new_unet train_text_encoder text_encoder_learning_rate snr_gamma timestep_bias
diffusion_scheduler_config hardware skip_jax_distributed_system mesh_axes logical_axis_rules
data_sharding dcn_data_parallelism dcn_fsdp_parallelism dcn_context_parallelism
dcn_tensor_parallelism ici_data_parallelism ici_fsdp_parallelism ici_context_parallelism
ici_tensor_parallelism allow_split_physical_axes dataset_name train_split dataset_type
cache_latents_text_encoder_outputs dataset_save_location train_data_dir dataset_config_name
jax_cache_dir hf_data_dir hf_train_files hf_access_token grain_train_files grain_worker_count
image_column caption_column resolution center_crop random_flip tokenize_captions_num_proc
transform_images_num_proc reuse_example_batch enable_data_shuffling checkpoint_every
enable_single_replica_ckpt_restoring learning_rate scale_lr max_train_samples max_train_steps
num_train_epochs seed per_device_batch_size warmup_steps_fraction learning_rate_schedule_steps
adam_b1 adam_b2 adam_eps adam_weight_decay opt_enable_grad_clipping max_grad_value
opt_enable_grad_global_norm_clipping max_grad_norm enable_profiler skip_first_n_steps_for_profiler
profiler_steps prompt negative_prompt guidance_scale guidance_rescale num_inference_steps
enable_mllog instance_data_dir instance_prompt class_data_dir class_prompt prior_loss_weight
num_class_images cache_dreambooth_dataset quantization quantization_local_shard_count
use_qwix_quantization compile_topology_num_slices data_files_pattern extracted_files_dir
tfrecords_dir no_records_per_shard enable_ml_diagnostics profiler_gcs_path enable_ondemand_xprof
controlnet_model_name_or_path controlnet_from_pt controlnet_conditioning_scale controlnet_image
flash_min_seq_length remat_policy
""".split()
# The arguments of diffusers' train_text_to_image.py at 58eb52c0, and those its LoRA twin adds.
DIFFUSERS_ARGUMENTS = """
pretrained_model_name_or_path revision variant non_ema_revision dataset_name dataset_config_name
train_data_dir image_column caption_column max_train_samples cache_dir output_dir seed resolution
center_crop random_flip image_interpolation_mode train_batch_size dataloader_num_workers
num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing mixed_precision
allow_tf32 enable_xformers_memory_efficient_attention learning_rate scale_lr lr_scheduler
lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_8bit_adam max_grad_norm
snr_gamma dream_training dream_detail_preservation noise_offset input_perturbation prediction_type
use_ema foreach_ema offload_ema validation_prompts validation_epochs checkpointing_steps
checkpoints_total_limit resume_from_checkpoint push_to_hub hub_token hub_model_id report_to
logging_dir tracker_project_name local_rank rank validation_prompt num_validation_images
""".split()
LISTS = {MAXDIFFUSION: MAXDIFFUSION_KEYS, DIFFUSERS: DIFFUSERS_ARGUMENTS}


@pytest.mark.parametrize("peer", LISTS)
def test_every_name_has_an_outcome(peer: str) -> None:
    missing = [name for name in LISTS[peer] if name not in TABLE or peer not in TABLE[name].peers]
    assert missing == []


@pytest.mark.parametrize("peer", LISTS)
def test_no_outcome_is_for_a_name_the_peer_does_not_have(peer: str) -> None:
    invented = [row.name for row in TABLE.values() if peer in row.peers]
    assert sorted(set(invented) - set(LISTS[peer])) == []


def test_keys_exist_and_planned_ones_do_not_yet() -> None:
    there = {*leaves(), *groups(), *group_options([CONF])}
    by_outcome = {outcome: [] for outcome in Outcome}
    for row in TABLE.values():
        by_outcome[row.outcome].append(row)
    assert [row.name for row in by_outcome[Outcome.key] if row.target not in there] == []
    assert [row.name for row in by_outcome[Outcome.planned] if row.target in there] == []
    assert [row.name for row in by_outcome[Outcome.unsupported] if not row.note] == []


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_translated_values_are_values_of_the_key(row: Row) -> None:
    leaf = leaves().get(row.target or "")
    if leaf is not None and leaf.choices and not leaf.element:
        assert set(row.values.values()) - {"…"} <= {*leaf.choices, "null"}


@pytest.mark.parametrize(
    ("name", "got", "rule", "fix"),
    [
        ("--train_batch_size", "4", "a name of diffusers", "use train.per_device_batch_size=4"),
        ("--use-ema", None, "a name of diffusers", "use train.ema=true"),
        (
            "--mixed_precision",
            "fp16",
            "a name of diffusers",
            "use model.activations_dtype=bfloat16"
            " (float16 would need loss scaling, bfloat16 does not)",
        ),
        ("train_new_unet", "True", "a name of MaxDiffusion", "use model.init=random"),
        (
            "metrics_file",
            "x",
            "a name of MaxDiffusion, automatic in sdx (RUN/metrics.jsonl)",
            "leave it out",
        ),
        (
            "mesh_axes",
            "[data]",
            "a name of MaxDiffusion, not supported:"
            " the axes are data, fsdp and tensor; set mesh.ici.*, mesh.dcn.*",
            "leave it out",
        ),
    ],
)
def test_answers(name: str, got: str | None, rule: str, fix: str) -> None:
    assert answer(name, got) == (rule, fix)


def test_strangers_have_no_answer() -> None:
    assert answer("zebra", "1") is None
