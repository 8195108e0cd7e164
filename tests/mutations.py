"""Would the tests notice? Plants classic bugs of diffusion code one at a time and runs the tests
that should turn red.

    python -m tests.mutations [--only TEXT]

Works in a temporary copy of the repository; first the copy as it is must be green. Prints the
table that tests/README.md keeps, and ends with 1 where a bug survived. Takes half an hour.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("sdx", "conf", "launchers", "tests", "pyproject.toml")
FLAGS = "tests/parallel/test_xla_flags.py"
ATTENTION_MESH = "tests/models/test_attention_mesh.py"
FORWARD = "tests/parity/test_forward.py"
GRADIENTS = "tests/parity/test_training.py::test_gradients_of_every_parameter"
PIPELINE = "tests/test_pipeline.py"
STEP = "tests/training/test_step.py"
CHECKPOINTS = "tests/training/test_checkpoint_processes.py"
PROCESSES = "tests/experiment/test_processes.py"
WORKERS = "tests/launchers/test_workers.py"
TPU = "tests/launchers/test_tpu.py"
SWEEPS = "tests/launchers/test_driver.py"
TPU_STRAYS = "tests/launchers/test_tpu_strays.py"
SNAPSHOT = "tests/record/test_snapshot.py"
RUNS_TABLE = "tests/launchers/test_runs_table.py"
RUNS_COMMAND = "tests/launchers/test_runs_command.py"


@dataclass(frozen=True)
class Mutation:
    """One bug: in `file`, `right` becomes `wrong`; any of `tests` must fail."""

    bug: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "epsilon of the transformer's GroupNorm is the ResNet's, 1e-5",
        "sdx/models/attention.py",
        "TRANSFORMER_NORM_EPS = 1e-6",
        "TRANSFORMER_NORM_EPS = 1e-5",
        (f"{FORWARD}::test_epsilons_of_norms",),
    ),
    Mutation(
        "epsilon of the autoencoder's GroupNorm is the UNet's, 1e-5",
        "sdx/models/vae.py",
        "VAE_NORM_EPS = 1e-6",
        "VAE_NORM_EPS = 1e-5",
        (f"{FORWARD}::test_epsilons_of_norms",),
    ),
    Mutation(
        "the UNet's GELU is the tanh approximation",
        "sdx/models/attention.py",
        "return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))",
        "return jax.nn.gelu(x, approximate=True)",
        (f"{FORWARD}::test_predictions",),
    ),
    Mutation(
        "2.x's text encoder has 1.x's quick GELU",
        "sdx/models/clip_text.py",
        "HiddenAct.gelu: exact_gelu",
        "HiddenAct.gelu: quick_gelu",
        (f"{FORWARD}::test_text_states",),
    ),
    Mutation(
        "text states lack the final LayerNorm",
        "sdx/models/clip_text.py",
        "states = self.final_layer_norm(self.encoder(self.embeddings(tokens)))",
        "states = self.encoder(self.embeddings(tokens))",
        (f"{FORWARD}::test_text_states",),
    ),
    Mutation(
        "text states of the last layer, not of the one before (original 2.x files)",
        "sdx/weights/original_names.py",
        "UNUSED_LAYER = 23",
        "UNUSED_LAYER = 22",
        ("tests/weights/test_original_names.py",),
    ),
    Mutation(
        "tokens see those after them",
        "sdx/models/clip_text.py",
        "is_causal=True",
        "is_causal=False",
        (f"{FORWARD}::test_text_states",),
    ),
    Mutation(
        "latents are trained without 0.18215",
        "sdx/training/step.py",
        'sample_latents(streams("latents"), moments) * rule.scaling_factor',
        'sample_latents(streams("latents"), moments)',
        (f"{STEP}::test_latents_are_scaled_and_noised_as_the_target_says",),
    ),
    Mutation(
        "latents are decoded without 1 / 0.18215",
        "sdx/pipeline.py",
        "clean = to_host(clean) / self.scaling_factor",
        "clean = to_host(clean)",
        (f"{PIPELINE}::test_guided_trajectory_is_diffusers",),
    ),
    Mutation(
        "pixels become tokens row by row and come back column by column",
        "sdx/models/attention.py",
        "y = self.transformer_blocks[0](y, context).reshape(b, h, w, c)",
        "y = self.transformer_blocks[0](y, context).reshape(b, w, h, c).swapaxes(1, 2)",
        (f"{FORWARD}::test_predictions",),
    ),
    Mutation(
        "convolution kernels are WHIO",
        "sdx/weights/names.py",
        "4: (3, 2, 0, 1)",
        "4: (3, 2, 1, 0)",
        (f"{FORWARD}::test_predictions",),
    ),
    Mutation(
        "heads are interleaved channels",
        "sdx/models/attention.py",
        "return x.reshape(*x.shape[:2], num_heads, -1)",
        "return x.reshape(*x.shape[:2], -1, num_heads).swapaxes(2, 3)",
        (f"{FORWARD}::test_predictions",),
    ),
    Mutation(
        "skips are joined before what comes from below",
        "sdx/models/unet.py",
        "jnp.concatenate(inputs, -1)",
        "jnp.concatenate(inputs[::-1], -1)",
        (f"{FORWARD}::test_predictions",),
    ),
    Mutation(
        "sines of the timestep before its cosines",
        "sdx/models/layers.py",
        "waves[::-1] if flip_sin_to_cos else waves",
        "waves",
        (f"{FORWARD}::test_predictions",),
    ),
    Mutation(
        "the autoencoder's strided convolutions pad every side",
        "sdx/models/vae.py",
        "LOPSIDED = ((0, 1), (0, 1))",
        "LOPSIDED = ((1, 1), (1, 1))",
        (f"{FORWARD}::test_images_to_moments_and_back",),
    ),
    Mutation(
        "the UNet is told the timestep after the one that was noised",
        "sdx/training/step.py",
        "prediction = rule.predict(params, noisy, timesteps, examples.conditioning)",
        "prediction = rule.predict(params, noisy, timesteps + 1, examples.conditioning)",
        (GRADIENTS,),
    ),
    Mutation(
        "sampling visits 900, 800, ..., 0 (steps_offset 0)",
        "sdx/diffusion/plans.py",
        "STEPS_OFFSET = 1",
        "STEPS_OFFSET = 0",
        ("tests/diffusion/test_plans.py", f"{PIPELINE}::test_guided_trajectory_is_diffusers"),
    ),
    Mutation(
        "the velocity of Salimans & Ho with its sign turned",
        "sdx/diffusion/objective.py",
        "return signal * noise - sigma * latents",
        "return sigma * latents - signal * noise",
        ("tests/diffusion/test_objective.py",),
    ),
    Mutation(
        "a model that predicts velocity is trained on the noise",
        "sdx/training/program.py",
        "make_objective(config.diffusion, resolve.prediction_type(config))",
        'make_objective(config.diffusion, type(resolve.prediction_type(config))["epsilon"])',
        ("tests/parity/test_loss_curve.py::test_losses_are_torchs_step_by_step",),
    ),
    Mutation(
        "betas are linear, not the squares of a line",
        "sdx/diffusion/schedule.py",
        "betas = _linspace(start**0.5, end**0.5, length) ** 2",
        "betas = _linspace(start, end, length)",
        ("tests/diffusion/test_schedule.py",),
    ),
    Mutation(
        "Min-SNR of velocity is divided by the ratio, not by the ratio + 1",
        "sdx/diffusion/objective.py",
        "return jnp.minimum(snr, gamma) / (snr + 1)",
        "return jnp.minimum(snr, gamma) / snr",
        (GRADIENTS,),
    ),
    Mutation(
        "noise and the draw from the posterior share a stream",
        "sdx/training/step.py",
        'sample_latents(streams("latents"), moments)',
        'sample_latents(streams("noise"), moments)',
        (GRADIENTS,),
    ),
    Mutation(
        "guidance away from the prompt: both halves of the batch swapped",
        "sdx/diffusion/guidance.py",
        "jnp.concatenate([negative_context, context])",
        "jnp.concatenate([context, negative_context])",
        ("tests/diffusion/test_guidance.py",),
    ),
    Mutation(
        "DPM-Solver++ leaves out its second order",
        "sdx/diffusion/plans.py",
        "strides[1:] / (2 * strides[:-1])",
        "0 * strides[1:]",
        ("tests/sampling/test_denoise.py::test_guided_trajectory_is_diffusers",),
    ),
    Mutation(
        "Adam's epsilon inside the root",
        "sdx/training/optimizer.py",
        "(jnp.sqrt(n / correct2) + eps)",
        "jnp.sqrt(n / correct2 + eps)",
        ("tests/parity/test_training.py::test_five_updates",),
    ),
    Mutation(
        "weight decay is part of the gradient (Adam with L2, not AdamW)",
        "sdx/training/optimizer.py",
        "mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)",
        "updates = jax.tree.map(lambda g, p: g + decay * p, updates, params)\n"
        "        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)\n"
        "        params = jax.tree.map(jnp.zeros_like, params)",
        ("tests/parity/test_training.py::test_five_updates",),
    ),
    Mutation(
        "the first update already has the second's learning rate",
        "sdx/training/optimizer.py",
        "rate(state.count)), *trees)\n\n        changes = jax.tree.map(change_all, rates, mu",
        "rate(count)), *trees)\n\n        changes = jax.tree.map(change_all, rates, mu",
        ("tests/parity/test_training.py::test_five_updates",),
    ),
    Mutation(
        "the average's decay is one update ahead",
        "sdx/training/optimizer.py",
        "jnp.minimum((1 + count) / (10 + count), cap)",
        "jnp.minimum((2 + count) / (11 + count), cap)",
        ("tests/training/test_optimizer.py", "tests/parity/test_training.py::test_five_updates"),
    ),
    Mutation(
        "the average is not restored: it starts again from the weights",
        "sdx/training/checkpoint.py",
        "jax.tree.unflatten(structure, [restored[name] for name in wanted])",
        "jax.tree.unflatten(\n"
        '        structure, [restored[name.replace("ema/", "params/")] for name in wanted]\n'
        "    )",
        ("tests/training/test_checkpoint.py::test_the_state_comes_back_as_saved",),
    ),
    Mutation(
        "pictures are drawn with the weights, not with their average",
        "sdx/pipeline.py",
        'which = which or ("ema" if config.train.ema else "params")',
        'which = which or "params"',
        ("tests/experiment/test_text_encoder.py::test_it_draws_with_what_it_learned",),
    ),
    Mutation(
        "captions are normalised by compatibility (NFKC): ½ becomes 1/2",
        "sdx/data/tokenizer.py",
        "normalizers.NFC()",
        "normalizers.NFKC()",
        ("tests/data/test_tokenizer.py",),
    ),
    Mutation(
        "an exported scheduler does not say what the UNet predicts",
        "sdx/weights/scheduler.py",
        '"prediction_type": prediction_type.name',
        '"prediction_type": "epsilon"',
        ("tests/weights/test_scheduler.py",),
    ),
    Mutation(
        "an epoch's examples come in the order of the epoch before",
        "sdx/data/order.py",
        "offset = shuffled(offset, self.length, seed=self.seed, epoch=epoch)",
        "offset = shuffled(offset, self.length, seed=self.seed, epoch=0)",
        ("tests/data/test_order.py",),
    ),
    Mutation(
        "what fills the last batch of a bucket counts too",
        "sdx/data/order.py",
        "return Places(places, sum(p < len(members) for p in positions))",
        "return Places(places, len(positions))",
        ("tests/data/test_order.py",),
    ),
    Mutation(
        "the centre of an image is half a pixel off where halves are rounded up",
        "sdx/data/images.py",
        "return round((height - size[0]) / 2), round((width - size[1]) / 2)",
        "return (height - size[0] + 1) // 2, (width - size[1] + 1) // 2",
        ("tests/data/test_images.py::test_every_filter_equals_torchvisions_to_the_pixel",),
    ),
    Mutation(
        "every epoch is shown the first view that was cached",
        "sdx/data/cache/rows.py",
        "view = epoch % num_views",
        "view = 0",
        ("tests/experiment/encoding/test_encoding.py::test_rows_are_those_of_the_pixels",),
    ),
    Mutation(
        "validation measures examples at timesteps of their row, not their own",
        "sdx/training/evaluation.py",
        "places = (indices.astype(np.uint64) * _GOLDEN + _HALF) % 2**32",
        "places = (np.arange(len(indices), dtype=np.uint64) * _GOLDEN + _HALF) % 2**32",
        ("tests/training/test_evaluation.py",),
    ),
    Mutation(
        "Lion's sign is taken of the average kept, not of the one that looks ahead",
        "sdx/training/optimizer.py",
        "jnp.sign(b1 * m + (1 - b1) * g)",
        "jnp.sign(b2 * m + (1 - b2) * g)",
        ("tests/training/test_update_rules.py::test_lion_is_its_formula",),
    ),
    Mutation(
        "the end-of-text is ignored with the padding",
        "sdx/models/clip_text.py",
        "<= ends[:, None]",
        "< ends[:, None]",
        ("tests/models/test_padding.py",),
    ),
    Mutation(
        "FID's covariance divides by n",
        "sdx/scores/frechet.py",
        "self._products / (self.count - 1)",
        "self._products / self.count",
        ("tests/scores/test_frechet.py",),
    ),
    Mutation(
        "JAX reads the environment before the compiler flags are in it",
        "sdx/train.py",
        """    set_flags(config.xla, config.hardware, config.run.compilation_cache_dir)
    from sdx.experiment import run as experiment
""",
        """    from sdx.experiment import run as experiment

    set_flags(config.xla, config.hardware, config.run.compilation_cache_dir)
""",
        (f"{FLAGS}::test_commands_set_flags_before_they_import_jax",),
    ),
    Mutation(
        "the configuration's flags win over those a person set in the environment",
        "sdx/parallel/xla_flags.py",
        'return " ".join([*ours, theirs] if theirs else ours)',
        'return " ".join([theirs, *flags] if theirs else flags)',
        (f"{FLAGS}::test_what_the_environment_names_too_gives_way_and_is_told",),
    ),
    Mutation(
        "flags that were tried with one release are taken for good with the next",
        "sdx/parallel/flag_probe.py",
        'told = f"{compiler.package} {compiler.version} {text}"',
        'told = f"{compiler.package} {text}"',
        (f"{FLAGS}::test_good_flags_are_tried_once",),
    ),
    Mutation(
        "v4 is described with a device for each of its cores",
        "conf/hardware/tpu_v4_32.yaml",
        "  chip_config: megacore\n",
        "",
        ("tests/planning/test_presets.py",),
    ),
    Mutation(
        "a collective of a loop is counted once",
        "sdx/planning/collectives.py",
        "yield from _executed(body, times * rounds, computations)",
        "yield from _executed(body, times, computations)",
        ("tests/planning/test_collectives.py::test_loops_multiply",),
    ),
    Mutation(
        "a collective that is split over fusions is counted in each",
        "sdx/planning/collectives.py",
        "if (found.kind, found.name) not in seen:",
        "if True:",
        ("tests/planning/test_collectives.py::test_one_collective_split_over_fusions_counts_once",),
    ),
    Mutation(
        "the plan forgets that the state lies beside encode",
        "sdx/planning/compiled.py",
        "resident = other.bytes.arguments if other.bytes else 0",
        "resident = 0",
        ("tests/planning/test_compiled.py::test_what_the_other_program_needs_lies_beside",),
    ),
    Mutation(
        "a kernel that overflows vector memory is taken for a device's",
        "sdx/planning/compiler.py",
        'rf"Used {_AMOUNT} of {_AMOUNT} hbm"',
        'rf"Used {_AMOUNT} of {_AMOUNT}"',
        ("tests/planning/test_compiled.py::test_what_a_compiler_says_of_memory",),
    ),
    Mutation(
        "SIGUSR2 to one of many processes is not sent on to JAX",
        "sdx/parallel/stopping.py",
        "                os.kill(os.getpid(), signal.SIGTERM)",
        "                pass",
        ("tests/parallel/test_together.py::test_a_signal_to_one_stops_both_before_the_same_step",),
    ),
    Mutation(
        "a process that died is not missed",
        "sdx/parallel/failures.py",
        "failure = self._missed(signs.silent())",
        "failure = None",
        (
            "tests/parallel/test_together.py::"
            "test_the_death_of_one_ends_the_other_within_the_heartbeat",
        ),
    ),
    Mutation(
        "a step of srun counts the tasks of its whole job",
        "sdx/parallel/place.py",
        'steps if steps in environment else "SLURM_NTASKS"',
        '"SLURM_NTASKS"',
        ("tests/parallel/test_place.py::test_slurm_says_the_first_node_and_a_port_of_the_step",),
    ),
    Mutation(
        "hosts of a rehearsal outlive the command that started them",
        "sdx/parallel/rehearsal.py",
        "        os.read(pipe, 1)  # nothing is ever written: it is the end of the pipe",
        "        threading.Event().wait()",
        ("tests/parallel/test_rehearsal.py::test_hosts_die_with_the_command",),
    ),
    Mutation(
        "the first process proves its own part of a checkpoint in a store alone",
        "sdx/training/process_parts.py",
        "proofs = take_marks(event) if is_first() else []",
        "proofs = [files]",
        (f"{CHECKPOINTS}::test_hosts_without_a_common_disk_write_to_a_store",),
    ),
    Mutation(
        "the index that a process makes of its own part goes to the store",
        "sdx/training/process_parts.py",
        "        _keep_own_part(draft)\n        files",
        "        files",
        (f"{CHECKPOINTS}::test_hosts_without_a_common_disk_write_to_a_store",),
    ),
    Mutation(
        "what only one process finds wrong, the others do not hear of",
        "sdx/parallel/agreement.py",
        "    for told in gather(fault):",
        "    for told in [fault]:",
        (f"{CHECKPOINTS}::test_written_by_four_restored_by_two_and_one_and_back",),
    ),
    Mutation(
        "a reader takes parts of metrics that were cut back while it read",
        "sdx/record/parts.py",
        "if texts is not None and _goes_on(before, now):",
        "if texts is not None:",
        ("tests/record/test_parts.py::test_who_reads_while_parts_are_cut_sees_one_story",),
    ),
    Mutation(
        "every process removes the draft of a checkpoint, whether it is published or not",
        "sdx/training/checkpoint.py",
        "if is_first() or not self._place.is_shared:  # else the first one could not publish",
        "if True:",
        (f"{CHECKPOINTS}::test_written_by_four_restored_by_two_and_one_and_back",),
    ),
    Mutation(
        "the sum that sends one copy to the others is one of floats",
        "sdx/training/replicas.py",
        "    bits = jax.lax.bitcast_convert_type(copies, kind)",
        "    return jnp.sum(copies, axis=0)",
        (f"{CHECKPOINTS}::test_one_copy_is_read_and_all_have_it",),
    ),
    Mutation(
        "every process reads the first rows of the batch",
        "sdx/experiment/attempt.py",
        "                rows=program.host_rows,",
        "                rows=range(len(program.host_rows)),",
        (f"{PROCESSES}::test_each_process_reads_its_own_part_of_the_same_batch",),
    ),
    Mutation(
        "hosts with other data are not found out",
        "sdx/experiment/hosts.py",
        "        if theirs.get(name) != first[name]:",
        "        if False:",
        (f"{PROCESSES}::test_hosts_with_other_data_or_another_command_are_named",),
    ),
    Mutation(
        "attention.shard_sequence splits nothing",
        "sdx/models/attention_mesh.py",
        'return P(batch, "tensor"), P(batch)',
        "return P(batch), P(batch)",
        (f"{ATTENTION_MESH}::test_queries_are_split_by_length",),
    ),
    Mutation(
        "attention.shard_sequence splits keys with the queries",
        "sdx/models/attention_mesh.py",
        'return P(batch, "tensor"), P(batch)',
        'return P(batch, "tensor"), P(batch, "tensor")',
        (f"{ATTENTION_MESH}::test_devices_get_their_part",),
    ),
    Mutation(
        "only the longest sequence must divide over axis tensor",
        "sdx/config/check_attention.py",
        "            if length % tensor",
        "            if max(each) % tensor",
        ("tests/config/test_check.py::test_queries_of_every_bucket_must_divide",),
    ),
    Mutation(
        "keys that pad a tile are attended to",
        "sdx/models/attention_kernels.py",
        "row = (jnp.arange(padded) < num_keys).astype(jnp.int32)",
        "row = jnp.ones(padded, jnp.int32)",
        ("tests/models/test_attention_kernels.py::test_kernels_are_the_plain_products",),
    ),
    Mutation(
        "GPUs of one host are parted by the number of their process",
        "sdx/parallel/mesh.py",
        'return getattr(device, "slice_index", 0) or 0, device.process_index, device.id',
        "return 0, device.process_index, device.id",
        (
            "tests/parallel/test_mesh.py::test_gpus_are_grouped_by_host_however_processes_are_numbered",
        ),
    ),
    Mutation(
        "a batch over slices need only divide over one of them",
        "sdx/config/check_mesh.py",
        "return math.prod(sizes.total[:2])",
        "return math.prod(sizes.ici[:2])",
        ("tests/config/test_check.py::test_rule",),
    ),
    Mutation(
        "devices that share a feed-forward layer exchange its activations",
        "sdx/parallel/sharding.py",
        'return OverWidth(mesh) if mesh.shape["tensor"] > 1 else None',
        "return None",
        ("tests/parallel/test_width.py",),
    ),
    Mutation(
        "every device draws the whole network at random",
        "sdx/models/module.py",
        "(_slices if in_parts else _cuts)(",
        "_cuts(",
        ("tests/parallel/test_start.py::test_no_device_draws_what_it_does_not_hold",),
    ),
    Mutation(
        "the state handed to a step is kept beside the next one",
        "sdx/training/program.py",
        "            donate_argnums=0,\n",
        "",
        ("tests/training/test_meshes.py::test_no_mesh_changes_the_numbers",),
    ),
    Mutation(
        "sdx.plan: accumulation divides the images that are encoded at once",
        "sdx/planning/estimate.py",
        "        images=images,",
        "        images=images / config.train.gradient_accumulation,",
        (
            "tests/planning/test_estimate.py::"
            "test_encoding_takes_whole_updates_and_nothing_from_a_cache",
        ),
    ),
    Mutation(
        "sdx.plan: arrays of a TPU are counted without their tiles",
        "sdx/planning/arrays.py",
        "    stored = tpu_numbers if platform is Platform.tpu else math.prod",
        "    stored = math.prod",
        ("tests/planning/test_temporaries.py",),
    ),
    Mutation(
        "sdx.plan: a compiler that differs from the estimate is not heard",
        "sdx/planning/verdict.py",
        """    if compiled_fits is None:
        return estimate.fits""",
        """    if compiled_fits is not True:
        return estimate.fits""",
        ("tests/planning/test_report.py",),
    ),
    Mutation(
        "remat=dots does not see the products",
        "sdx/models/layers.py",
        "    return _product_value(x, kernel, precision), (x, kernel)",
        "    return _product(x, kernel, precision), (x, kernel)",
        ("tests/models/test_unet.py::test_what_is_recomputed",),
    ),
    Mutation(
        "a SLURM job that is told to stop does not go back into the queue",
        "launchers/sdx_launchers/slurm/after.py",
        "or _requeue()",
        'or "not requeued"',
        (
            "tests/launchers/test_slurm_requeue.py::"
            "test_jobs_told_to_stop_in_mid_step_go_on_bit_equal",
        ),
    ),
    Mutation(
        "processes of a SLURM job outlive a dead one",
        "launchers/sdx_launchers/slurm/script.py",
        '"--kill-on-bad-exit=1"',
        '"--kill-on-bad-exit=0"',
        (
            "tests/launchers/test_slurm_requeue.py::"
            "test_a_killed_process_takes_its_job_back_into_the_queue",
        ),
    ),
    Mutation(
        "a SLURM job is judged by the processes that srun ended, not by the one that failed",
        "launchers/sdx_launchers/slurm/after.py",
        "named, how = found[0]",
        "named, how = found[-1]",
        ("tests/launchers/test_slurm_script.py::test_what_is_done_or_failed_does_not_go_on",),
    ),
    Mutation(
        "a SLURM that does not answer has lost its jobs",
        "launchers/sdx_launchers/slurm/launcher.py",
        "if state is None and not self._queue.is_silent:",
        "if state is None:",
        ("tests/launchers/test_slurm_launcher.py::test_a_silent_scheduler_loses_no_job",),
    ),
    Mutation(
        "a SLURM job starts before it is written down",
        "launchers/sdx_launchers/slurm/script.py",
        '            "hold": True,\n',
        "",
        ("tests/launchers/test_slurm_script.py::test_golden",),
    ),
    Mutation(
        "jobs of a SLURM sweep are no array",
        "launchers/sdx_launchers/slurm/script.py",
        "executor.map_array(os.execvp, [argv[0] for argv in commands], commands)",
        "[executor.submit(os.execvp, argv[0], argv) for argv in commands]",
        (
            "tests/launchers/test_slurm_requeue.py::"
            "test_a_detached_sweep_returns_with_the_ids_of_its_jobs",
        ),
    ),
    Mutation(
        "a job on a TPU worker that ends with 255 is a lost connection",
        "launchers/sdx_launchers/tpu/remote_processes.py",
        "        if (found := re.search(told, said, re.MULTILINE)) is not None:",
        "        found = re.search(told, said, re.MULTILINE)\n"
        "        if found is not None and self.client.returncode != 255:",
        (f"{WORKERS}::test_one_failure_ends_all_and_says_whose_it_was",),
    ),
    Mutation(
        "another machine at the address of a TPU worker is trusted",
        "launchers/sdx_launchers/tpu/ssh.py",
        '"StrictHostKeyChecking": "accept-new"',
        '"StrictHostKeyChecking": "no"',
        (
            f"{WORKERS}::test_a_worker_whose_sshd_comes_late_is_waited_for_and_another_key_is_refused",
        ),
    ),
    Mutation(
        "TPU workers get the whole environment of the launching side",
        "launchers/sdx_launchers/tpu/workers.py",
        "{name: os.environ[name] for name in names}",
        "dict(os.environ)",
        (f"{WORKERS}::test_a_command_instead_of_ssh_and_a_token_that_is_written_nowhere",),
    ),
    Mutation(
        "a job on a TPU worker is asked to stop together with what works for it",
        "launchers/sdx_launchers/tpu/supervise.py",
        "self.process.send_signal(signal.SIGTERM)",
        "os.killpg(self.process.pid, signal.SIGTERM)",
        ("tests/launchers/test_supervise.py::test_what_works_for_the_job_lives_while_it_saves",),
    ),
    Mutation(
        "jobs of SLURM run the code of the moment they start",
        "launchers/sdx_launchers/slurm/launcher.py",
        "max_parallel, snapshot.python_path)",
        "max_parallel, [Path(__file__).parents[2], Path(__file__).parents[1]])",
        (
            "tests/launchers/test_slurm_sweeps.py::"
            "test_jobs_run_the_code_of_the_moment_they_were_handed_in",
        ),
    ),
    Mutation(
        "a sweep believes its launcher before the record of the run",
        "launchers/sdx_launchers/sweep/standing.py",
        "return Ended(run.status, run.reason or told)",
        "return ended",
        (f"{SWEEPS}::test_whose_word_counts",),
    ),
    Mutation(
        "a sweep with fail_fast goes on with the next job",
        "launchers/sdx_launchers/sweep/course.py",
        "heard, is_stopping = signals.count, True\n            pending.clear()",
        "heard, is_stopping = signals.count, True",
        (f"{SWEEPS}::test_fail_fast_stops_those_that_run_and_starts_no_others",),
    ),
    Mutation(
        "a job that was cut off with the sweep before is not gone on with",
        "launchers/sdx_launchers/sweep/course.py",
        "                pending.append(job)\n        if",
        "                pass\n        if",
        (f"{SWEEPS}::test_what_a_sweep_before_started_is_waited_for",),
    ),
    Mutation(
        "keys of a sweep that are tied together are multiplied out",
        "sdx/config/expansion.py",
        "return list(ties.values()), problems",
        "return [[key] for key in keys], problems",
        ("tests/config/test_sweeping.py::test_tied_keys_change_together",),
    ),
    Mutation(
        "a search that was cut off asks its first trials again",
        "launchers/sdx_launchers/search/study.py",
        "seed = (settings.seed * _SPREAD + number) % 2**32",
        "seed = settings.seed",
        ("tests/launchers/test_study.py::test_seeds_repeat_however_often_the_search_was_cut_off",),
    ),
    Mutation(
        "trials that a killed search was running are forgotten",
        "launchers/sdx_launchers/search/trials.py",
        "self._before.extend(self.study.running())",
        "self._before.extend([])",
        (
            "tests/launchers/test_search.py::"
            "test_a_search_killed_anywhere_goes_on_with_the_same_runs",
        ),
    ),
    Mutation(
        "a run is stopped by what was asked of the start before",
        "sdx/record/run.py",
        "    forget_stop(paths)\n",
        "",
        (
            "tests/record/test_stop_request.py::"
            "test_the_same_start_goes_on_and_hears_nothing_of_before",
        ),
    ),
    Mutation(
        "jobs that run at the same time share all cores",
        "launchers/sdx_launchers/local/launcher.py",
        'with open(path, "ab") as log, _on(share):',
        'with open(path, "ab") as log:',
        (
            "tests/launchers/test_local.py::"
            "test_two_jobs_have_their_own_cores_and_save_when_their_sweep_is_killed",
        ),
    ),
    Mutation(
        "TPUs of other owners are strays too",
        "launchers/sdx_launchers/tpu/strays.py",
        "if found.labels.get(OWNER) == owner]",
        "if OWNER in found.labels]",
        (f"{TPU_STRAYS}::test_only_ones_own_expired_leases_are_deleted",),
    ),
    Mutation(
        "only a launcher of this machine vouches for a TPU, no lease does",
        "launchers/sdx_launchers/tpu/strays.py",
        "return max(map(lease_end, current)) > time.time()",
        "return False",
        (f"{TPU_STRAYS}::test_only_ones_own_expired_leases_are_deleted",),
    ),
    Mutation(
        "a TPU's name is written down after it was asked for",
        "launchers/sdx_launchers/tpu/pool.py",
        "        operation = self._tpus.create(request)",
        "        self._ledger.strike(name)\n        operation = self._tpus.create(request)",
        (
            f"{TPU}::test_its_name_is_on_the_ledger_before_it_is_asked_for",
            f"{TPU_STRAYS}::test_what_a_killed_launcher_left_is_deleted_by_the_next_start",
        ),
    ),
    Mutation(
        "exit code 75 on a preempted TPU ends the job",
        "launchers/sdx_launchers/tpu/run.py",
        "why = self._look(tpu, _LOOKS.get(end.code, 1))",
        "why = None if end.code == 75 else self._look(tpu, _LOOKS.get(end.code, 1))",
        (f"{TPU}::test_a_preempted_job_goes_on_with_another_tpu",),
    ),
    Mutation(
        "a snapshot of the code whose files were changed is used as it is",
        "sdx/record/snapshot.py",
        'found == record["files"] and _digest(record) == path.name',
        "_digest(record) == path.name",
        (f"{SNAPSHOT}::test_a_damaged_snapshot_is_taken_again",),
    ),
    Mutation(
        "a snapshot leaves out what git does not track",
        "sdx/record/snapshot.py",
        "{*_files(tracked_by, tracked), *untracked}",
        "{*_files(tracked_by, tracked)}",
        (f"{SNAPSHOT}::test_a_snapshot_is_the_work_tree_and_not_the_commit",),
    ),
    Mutation(
        "sdx.runs --cancel ends jobs of other sweeps",
        "launchers/sdx_launchers/runs/control.py",
        "if (owner := _other_sweep(watch.found, run)) is not None:",
        "if (owner := None) is not None:",
        (f"{RUNS_COMMAND}::test_cancelling_asks_jobs_of_the_sweep_and_no_others",),
    ),
    Mutation(
        "the last value of a metric is shown as the best",
        "launchers/sdx_launchers/sweep/objective.py",
        "return min(finite, key=lambda one: self.key(one.value or 0.0), default=None)",
        "return next(reversed(finite), None)",
        (f"{RUNS_TABLE}::test_a_metric_that_nobody_has_is_said_to_be_missing",),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="bugs whose description has this in it")
    chosen = [m for m in MUTATIONS if parser.parse_args().only in m.bug]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "sdx"
        for part in COPIED:
            _copy(REPOSITORY / part, copy / part)
        failed, output = run(copy, dict.fromkeys(test for m in chosen for test in m.tests))
        if failed:
            print(f"red before anything is planted: {failed}\n{output}")
            return 1
        survived = 0
        print("| planted bug | in | the test that turned red | s |\n|---|---|---|---|")
        for mutation in chosen:
            started = time.monotonic()
            noticed = plant(copy, mutation)
            survived += noticed is None
            seconds = time.monotonic() - started
            where = mutation.file.removeprefix("sdx/")
            verdict = f"`{noticed}`" if noticed else "**none: it survived**"
            print(f"| {mutation.bug} | `{where}` | {verdict} | {seconds:.0f} |", flush=True)
    return 1 if survived else 0


def plant(copy: Path, mutation: Mutation) -> str | None:
    """The first test that fails with the bug in `copy`, which is as before afterwards."""
    path = copy / mutation.file
    source = path.read_text()
    path.write_text(mutated(mutation, source))
    try:
        return run(copy, mutation.tests)[0]
    finally:
        path.write_text(source)


def mutated(mutation: Mutation, source: str) -> str:
    """`source` with the bug; raises where it has no or more than one such place."""
    if source.count(mutation.right) != 1:
        raise ValueError(f"{mutation.file}: holds {mutation.right!r} not exactly once")
    return source.replace(mutation.right, mutation.wrong)


def run(copy: Path, tests: Iterable[str]) -> tuple[str | None, str]:
    """The first of `tests` that fails in `copy`, if any, without its cases; and what pytest said.

    Raises where pytest could not run them: a bug must be noticed by a test, not by Python.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = [
        line.removeprefix("FAILED tests/").split(" - ")[0].split("[")[0]
        for line in done.stdout.splitlines()
        if line.startswith("FAILED ")
    ]
    return (failed or [None])[0], done.stdout


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


if __name__ == "__main__":
    sys.exit(main())
