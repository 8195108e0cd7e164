"""Rules a configuration must meet beyond the type of each key, all checked at once.

Pure and machine-independent: no device, file or network is looked at, so a configuration for a pod
can be checked on a laptop. What only the machine knows is checked where the job runs.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from sdx.config import (
    check_attention,
    check_cache,
    check_data,
    check_hardware,
    check_mesh,
    resolve,
)
from sdx.config.errors import Problem, any_of
from sdx.config.leaves import Leaf, leaves, spelled, value
from sdx.config.samplers import divides_by_zero, most_steps, refusal
from sdx.config.schema import (
    HUB_ID,
    Config,
    DownBlock,
    Init,
    LrScheduleKind,
    OptimizerKind,
    PredictionType,
    SamplerKind,
    Sink,
    TimestepBias,
)
from sdx.config.splits import Split, parse_split


def check(config: Config) -> list[Problem]:
    """Everything wrong with `config`; an empty list means it may run."""
    problems = [*_bounds(config), *_without_effect(config, _NEVER_IDLE)]
    for rule in _RULES:
        problems += rule(config)
    return problems


def check_given(config: Config, given: Iterable[str]) -> list[Problem]:
    """Keys a person typed that do nothing, so that no choice is ignored in silence.

    Unlike in `check`, it matters here who set a key: a recipe may carry numbers for a switch that
    is off.
    """
    typed = [path for path in leaves() if path in set(given)]
    problems = [*_without_effect(config, [path for path in typed if path not in _NEVER_IDLE])]
    for path in typed:
        winner = _OVERRULED_BY.get(path)
        if winner is None or None in (value(config, path), value(config, winner)):
            continue
        if not _agrees(config, path):
            rule = f"has no effect, {winner}={spelled(value(config, winner))} wins"
            fix = f"add {winner}=null"
            problems.append(Problem(path, spelled(value(config, path)), rule, fix))
    return problems


def has_effect(config: Config, path: str) -> bool:
    """Whether the key at `path` changes anything, given the other keys."""
    return path not in _NEEDS or _NEEDS[path][0](config)


HELD_OUT = """'data.split="train[:95%]"' 'eval.split="train[95%:]"'"""
"""How a part of the data is held out, as it is typed."""
_STORES = ("s3://", "gs://")
_FOLDERS_OF_SWEEPS = ("launches", "snapshots", "sweeps")  # beside the runs
_MAX_NAME_BYTES = 200  # file systems take 255; a sweep adds to the name
_OVERRULED_BY = {
    "train.epochs": "train.max_steps",
    "train.per_device_batch_size": "train.global_batch_size",
}


def _agrees(config: Config, path: str) -> bool:
    """Whether a per-device size and a global size that are both set say the same."""
    train, devices = config.train, config.hardware.num_devices
    if path != "train.per_device_batch_size" or devices is None:
        return False
    assert train.per_device_batch_size is not None
    product = train.per_device_batch_size * devices * train.gradient_accumulation
    return product == train.global_batch_size


def _warms_up(config: Config) -> bool:
    return config.lr_schedule.kind is not LrScheduleKind.constant


def _counts_from_decay(config: Config) -> bool:
    return (
        config.lr_schedule.kind in resolve.DECAYING
        or config.lr_schedule.warmup_fraction is not None
    )


def _is_polynomial(config: Config) -> bool:
    return config.lr_schedule.kind is LrScheduleKind.polynomial


def _restarts(config: Config) -> bool:
    return config.lr_schedule.kind is LrScheduleKind.cosine_with_restarts


def _is_biased(config: Config) -> bool:
    return config.diffusion.timestep_bias.strategy is not TimestepBias.none


def _biases_range(config: Config) -> bool:
    return config.diffusion.timestep_bias.strategy is TimestepBias.range


def _biases_portion(config: Config) -> bool:
    return _is_biased(config) and not _biases_range(config)


def _tells_wandb(config: Config) -> bool:
    return Sink.wandb in config.metrics.sinks


def _has_moment_decays(config: Config) -> bool:
    return config.optimizer.kind is not OptimizerKind.adafactor


def _is_adamw(config: Config) -> bool:
    return config.optimizer.kind is OptimizerKind.adamw


def _is_measured(config: Config) -> bool:
    return config.eval.every is not None


def _has_copies(config: Config) -> bool:
    """Of the model, as far as is known without the devices."""
    sizes = check_mesh.mesh_sizes(config.mesh, config.hardware)
    return sizes is None or sizes.total[0] > 1


def _is_traced(config: Config) -> bool:
    return config.profiler.enabled


# Keys that do something only in company: the condition, and how to meet it.
_NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    **check_data.NEEDS,
    **check_cache.NEEDS,
    "sample.num_adherence_prompts": (check_data.is_shapes, "data=shapes"),
    **check_attention.NEEDS,
    **check_hardware.NEEDS,
    "metrics.wandb.project": (_tells_wandb, "metrics.sinks=[wandb]"),
    "metrics.wandb.entity": (_tells_wandb, "metrics.sinks=[wandb]"),
    "optimizer.b1": (_has_moment_decays, "optimizer=adamw or lion"),
    "optimizer.b2": (_has_moment_decays, "optimizer=adamw or lion"),
    "optimizer.eps": (_is_adamw, "optimizer=adamw"),
    "optimizer.text_encoder_lr": (
        lambda config: config.train.text_encoder,
        "train.text_encoder=true",
    ),
    "diffusion.timestep_bias.multiplier": (_is_biased, "diffusion.timestep_bias.strategy"),
    "diffusion.timestep_bias.portion": (
        _biases_portion,
        "diffusion.timestep_bias.strategy=earlier or later",
    ),
    "diffusion.timestep_bias.begin": (_biases_range, "diffusion.timestep_bias.strategy=range"),
    "diffusion.timestep_bias.end": (_biases_range, "diffusion.timestep_bias.strategy=range"),
    "eval.split": (_is_measured, "eval.every=N"),
    "eval.num_batches": (_is_measured, "eval.every=N"),
    "eval.num_buckets": (_is_measured, "eval.every=N"),
    "checkpoint.keep_best": (_is_measured, "eval.every=N"),
    "checkpoint.single_replica_restore": (
        _has_copies,
        "several copies of the model, one for each place along data: mesh=dp or mesh=hsdp",
    ),
    "profiler.skip_steps": (_is_traced, "profiler.enabled=true"),
    "profiler.steps": (_is_traced, "profiler.enabled=true"),
    "export.hub_model_id": (lambda config: config.export.push_to_hub, "export.push_to_hub=true"),
    "sample.guidance_rescale": (
        lambda config: config.sample.guidance_scale != 1,
        "sample.guidance_scale above 1",
    ),
    "train.ema_decay": (lambda config: config.train.ema, "train.ema=true"),
    "lr_schedule.warmup_steps": (_warms_up, "lr_schedule=constant_with_warmup"),
    "lr_schedule.warmup_fraction": (_warms_up, "lr_schedule=constant_with_warmup"),
    "lr_schedule.decay_steps": (_counts_from_decay, "a schedule that decays, such as cosine"),
    "lr_schedule.num_cycles": (_restarts, "lr_schedule=cosine_with_restarts"),
    "lr_schedule.power": (_is_polynomial, "lr_schedule=polynomial"),
    "lr_schedule.end_lr": (_is_polynomial, "lr_schedule=polynomial"),
}

# Keys that must not stand idle, whoever set them: the run would not be what it says.
_NEVER_IDLE = (
    "data.dir",
    "lr_schedule.warmup_steps",
    "lr_schedule.warmup_fraction",
    "checkpoint.keep_best",
)


def _bounds(config: Config) -> Iterator[Problem]:
    for leaf in leaves().values():
        got = value(config, leaf.path)
        if isinstance(got, int | float) and (rule := outside(leaf, got)):
            fix = "null = off" if got == -1 and leaf.optional else None
            yield Problem(leaf.path, spelled(got), rule, fix)


def outside(leaf: Leaf, got: float) -> str | None:
    """What bounds of the key `got` is beyond; None where it is within."""
    low, high, above, below = leaf.at_least, leaf.at_most, leaf.above, leaf.below
    inside = (
        (low is None or got >= low)
        and (high is None or got <= high)
        and (above is None or got > above)
        and (below is None or got < below)
    )
    if not math.isfinite(got):
        return "must be a finite number"
    return None if inside else f"must be {bounds_text(leaf)}"


def bounds_text(leaf: Leaf) -> str:
    """`at least 0 and below 1`, or nothing."""
    words = {
        "at least": leaf.at_least,
        "above": leaf.above,
        "at most": leaf.at_most,
        "below": leaf.below,
    }
    return " and ".join(
        f"{word} {limit:.12g}" for word, limit in words.items() if limit is not None
    )


def _without_effect(config: Config, paths: Iterable[str]) -> Iterator[Problem]:
    for path in paths:
        got = value(config, path)
        if got != leaves()[path].default and not has_effect(config, path):
            fix = f"it needs {_NEEDS[path][1]}"
            yield Problem(path, spelled(got), "has no effect here", fix)


def _length(config: Config) -> Iterator[Problem]:
    if config.train.max_steps is None and config.train.epochs is None:
        yield Problem("train.max_steps", "null", "missing", "set it or train.epochs")


def _schedule(config: Config) -> Iterator[Problem]:
    schedule = config.lr_schedule
    steps, fraction = schedule.warmup_steps, schedule.warmup_fraction
    if not _warms_up(config):
        return
    if steps is not None and fraction is not None:
        rule = f"lr_schedule.warmup_steps={steps} is set too"
        fix = "give one: add lr_schedule.warmup_steps=null"
        yield Problem("lr_schedule.warmup_fraction", spelled(fraction), rule, fix)
        return
    if schedule.kind is LrScheduleKind.constant_with_warmup and steps is None and fraction is None:
        yield Problem(
            "lr_schedule.warmup_steps", "null", "missing", "set it or lr_schedule.warmup_fraction"
        )
    limit = schedule.decay_steps or config.train.max_steps
    decays = schedule.kind in resolve.DECAYING
    if decays and steps is not None and limit is not None and steps >= limit:
        name = "lr_schedule.decay_steps" if schedule.decay_steps else "train.max_steps"
        rule = f"the warm-up must end before {name}={limit}"
        yield Problem("lr_schedule.warmup_steps", str(steps), rule)
    if _is_polynomial(config) and schedule.end_lr >= config.optimizer.lr:
        rule = f"must be below optimizer.lr={spelled(config.optimizer.lr)}"
        yield Problem("lr_schedule.end_lr", spelled(schedule.end_lr), rule)


def _diffusion(config: Config) -> Iterator[Problem]:
    start, end = config.diffusion.beta_start, config.diffusion.beta_end
    if start >= end:
        rule = f"must be below diffusion.beta_end={spelled(end)}"
        yield Problem("diffusion.beta_start", spelled(start), rule)


def _objective(config: Config) -> Iterator[Problem]:
    diffusion, bias = config.diffusion, config.diffusion.timestep_bias
    learns = resolve.prediction_type(config)
    if diffusion.dream is not None and learns is not PredictionType.epsilon:
        rule = f"DREAM is defined for epsilon, this model learns {learns.name}"
        yield Problem("diffusion.dream", spelled(diffusion.dream), rule, "use null")
    if _is_biased(config) and bias.multiplier == 1:
        rule = f"strategy={bias.strategy.name} biases nothing with it"
        yield Problem("diffusion.timestep_bias.multiplier", "1", rule, "set it, 2 for instance")
    last = diffusion.num_train_timesteps - 1
    if _biases_portion(config) and bias.portion == 1:
        rule = f"strategy={bias.strategy.name} biases all timesteps alike with it"
        yield Problem("diffusion.timestep_bias.portion", "1", rule, "use less, 0.25 for instance")
    if _biases_range(config) and (bias.begin, bias.end) == (0, last):
        rule = "with diffusion.timestep_bias.begin=0 all timesteps are biased alike"
        yield Problem("diffusion.timestep_bias.end", str(last), rule, "give a part of them")
    if _biases_range(config) and bias.begin > bias.end:
        rule = f"must be at most diffusion.timestep_bias.end={bias.end}"
        yield Problem("diffusion.timestep_bias.begin", str(bias.begin), rule)
    if _biases_range(config) and bias.end > last:
        rule = f"at most {last}, the last timestep"
        yield Problem("diffusion.timestep_bias.end", str(bias.end), rule)


def _sampler(config: Config) -> Iterator[Problem]:
    diffusion, named, chosen = config.diffusion, config.diffusion.class_name, config.sampler.kind
    kind = resolve.sampler_kind(config)
    if named is not None and chosen not in (kind, SamplerKind.ddim):
        rule = f"names sampler={kind.name}, but sampler={chosen.name} is chosen"
        yield Problem("diffusion.class_name", named.name, rule, "give one of them")
    spacing, length = diffusion.timestep_spacing, diffusion.num_train_timesteps
    rescale, num_steps = diffusion.rescale_zero_terminal_snr, config.sample.num_steps
    learns = resolve.prediction_type(config)
    if reason := refusal(kind, learns, spacing, rescale=rescale):
        yield Problem("sampler.kind", kind.name, reason)
    if num_steps > (most := most_steps(kind, spacing, length)):
        rule = (
            f"at most {most} with sampler={kind.name}, diffusion.num_train_timesteps={length} and"
            f" diffusion.timestep_spacing={spacing.name}"
        )
        yield Problem("sample.num_steps", str(num_steps), rule)
    elif num_steps > 0 and divides_by_zero(
        kind, learns, spacing, rescale=rescale, num_timesteps=length, num_steps=num_steps
    ):
        rule = f"begins at the last timestep, where sampler={kind.name} would divide by zero signal"
        yield Problem("sample.num_steps", str(num_steps), rule, "use one step fewer")


def _export(config: Config) -> Iterator[Problem]:
    export = config.export
    if export.push_to_hub and not export.at_end:
        yield Problem("export.push_to_hub", "true", "nothing is exported", "add export.at_end=true")
    if export.push_to_hub and export.hub_model_id is None:
        fix = "export.push_to_hub=true needs export.hub_model_id=OWNER/NAME"
        yield Problem("export.hub_model_id", None, "missing", fix)
    name = export.hub_model_id
    if name is not None and not re.fullmatch(HUB_ID, name):
        yield Problem("export.hub_model_id", name, "must be OWNER/NAME")


def _evaluation(config: Config) -> Iterator[Problem]:
    length = config.diffusion.num_train_timesteps
    if config.eval.num_buckets > length:
        rule = f"at most diffusion.num_train_timesteps={length}"
        yield Problem("eval.num_buckets", str(config.eval.num_buckets), rule)
    if not _is_measured(config):
        return
    try:
        ours = parse_split(config.eval.split)
    except ValueError as error:
        yield Problem("eval.split", config.eval.split, str(error))
        return
    with suppress(ValueError):  # said of data.split
        if _overlap(ours, parse_split(config.data.split)):
            rule = f"data.split={config.data.split} trains on some of these"
            fix = f"give parts that do not meet: {HELD_OUT}"
            yield Problem("eval.split", config.eval.split, rule, fix)


def _overlap(one: Split, other: Split) -> bool:
    """Whether they share examples, however many of them there are."""
    if one.name != other.name:
        return False
    lengths = (100, 10**9)  # percentages of the first are exact, numbers fit into the second
    pairs = [(one.rows(length), other.rows(length)) for length in lengths]
    return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pairs)


def _best(config: Config) -> Iterator[Problem]:
    """A checkpoint is judged by the evaluation at its own step."""
    saved, measured, limit = config.checkpoint.every, config.eval.every, config.train.max_steps
    if config.checkpoint.keep_best is None or measured is None:
        return  # _NEEDS says so
    if saved and measured and (limit is None or math.lcm(saved, measured) < limit):
        return
    rule = (
        f"checkpoint.every={spelled(saved)} and eval.every={measured} do not meet before the end,"
        " and only checkpoints that are measured are compared"
    )
    fix = "make checkpoint.every a multiple of eval.every"
    yield Problem("checkpoint.keep_best", str(config.checkpoint.keep_best), rule, fix)


def _profiler(config: Config) -> Iterator[Problem]:
    profiler, limit = config.profiler, config.train.max_steps
    if profiler.enabled and limit is not None and profiler.skip_steps + profiler.steps > limit:
        rule = f"with profiler.skip_steps={profiler.skip_steps} at most train.max_steps={limit}"
        yield Problem("profiler.steps", str(profiler.steps), rule)


def _resolution(config: Config) -> Iterator[Problem]:
    pixels = resolve.resolution(config)
    if not config.model.vae.block_out_channels or not config.model.unet.block_out_channels:
        return  # _architecture says so
    factor = resolve.vae_factor(config) * resolve.unet_factor(config)
    if pixels % factor:
        path = "data.resolution" if config.data.resolution else "model.resolution"
        rule = f"must be a multiple of {factor} (VAE x UNet levels of model={config.model.name})"
        yield Problem(path, str(pixels), rule, _neighbours(pixels, factor))
    native, latents = config.model.resolution, config.model.unet.sample_size
    if native != latents * resolve.vae_factor(config):
        rule = f"must be {resolve.vae_factor(config)} x model.unet.sample_size={latents}"
        fix = "data.resolution is the size of training"
        yield Problem("model.resolution", str(native), rule, fix)


def _weights(config: Config) -> Iterator[Problem]:
    model = config.model
    is_random, alone = model.init is Init.random, model.unet_checkpoint
    if model.pretrained == "tiny" and not is_random and alone is None:
        rule = "the embedded model has no UNet to start from"
        fix = "use model.init=random, or give model.unet_checkpoint"
        yield Problem("model.init", "pretrained", rule, fix)
    if alone is not None and is_random:
        rule = "is not read with model.init=random"
        yield Problem("model.unet_checkpoint", alone, rule, "add model.init=pretrained")


def _architecture(config: Config) -> Iterator[Problem]:
    unet, vae, text = config.model.unet, config.model.vae, config.model.text_encoder
    yield from _levels("model.unet.block_out_channels", unet.block_out_channels)
    yield from _levels("model.vae.block_out_channels", vae.block_out_channels)
    yield from _same_length(config, "model.unet.block_out_channels", "model.unet.down_block_types")
    yield from _same_length(
        config, "model.unet.block_out_channels", "model.unet.attention_head_dim"
    )
    unet_groups, vae_groups = "model.unet.norm_num_groups", "model.vae.norm_num_groups"
    yield from _divides(unet_groups, unet.norm_num_groups, unet.block_out_channels)
    yield from _divides(vae_groups, vae.norm_num_groups, vae.block_out_channels)
    attended = zip(
        unet.block_out_channels, unet.attention_head_dim, unet.down_block_types, strict=False
    )
    levels = len(unet.block_out_channels)
    for level, (channels, heads, kind) in enumerate(attended):
        in_use = kind is DownBlock.CrossAttnDownBlock2D or level == levels - 1
        if in_use and (heads < 1 or channels % heads):
            rule = f"level {level}: {heads} heads must divide its {channels} channels"
            yield Problem("model.unet.attention_head_dim", spelled(unet.attention_head_dim), rule)
    heads = "model.text_encoder.num_attention_heads"
    yield from _divides(heads, text.num_attention_heads, [text.hidden_size])
    yield from _equal(config, "model.unet.cross_attention_dim", "model.text_encoder.hidden_size")
    yield from _equal(config, "model.unet.in_channels", "model.vae.latent_channels")
    yield from _equal(config, "model.unet.out_channels", "model.vae.latent_channels")
    yield from _equal(config, "model.vae.out_channels", "model.vae.in_channels")
    if vae.in_channels != 3:
        yield Problem("model.vae.in_channels", str(vae.in_channels), "images have 3 channels")


def _levels(path: str, channels: list[int]) -> Iterator[Problem]:
    if not channels or min(channels) < 1:
        yield Problem(path, spelled(channels), "must be positive numbers, one for each level")


def _same_length(config: Config, first: str, second: str) -> Iterator[Problem]:
    one, other = value(config, first), value(config, second)
    if len(one) != len(other):
        rule = f"must have {len(one)} items, as many as {first}={spelled(one)}"
        yield Problem(second, spelled(other), rule)


def _divides(path: str, got: int, channels: list[int]) -> Iterator[Problem]:
    bad = [str(width) for width in channels if width % got] if got > 0 else []
    if bad:
        yield Problem(path, str(got), f"must divide {', '.join(dict.fromkeys(bad))} channels")


def _equal(config: Config, first: str, second: str) -> Iterator[Problem]:
    one, other = value(config, first), value(config, second)
    if one != other:
        yield Problem(first, spelled(one), f"must equal {second}={spelled(other)}")


def _batch(config: Config) -> Iterator[Problem]:
    train, devices = config.train, config.hardware.num_devices
    if train.global_batch_size is None and train.per_device_batch_size is None:
        yield Problem(
            "train.per_device_batch_size", "null", "missing", "set it or train.global_batch_size"
        )
        return
    if train.gradient_accumulation < 1 or (train.per_device_batch_size or 1) <= 0:
        return  # the bounds say so
    unit, formula = _batch_unit(config)
    if train.global_batch_size is not None:
        size = train.global_batch_size
        if unit and size % unit:
            rule = f"must be a multiple of {formula} = {unit}"
            yield Problem("train.global_batch_size", str(size), rule, _neighbours(size, unit))
    elif devices is not None and unit:
        try:
            size = resolve.global_batch_size(config)
        except ValueError:
            size = 0
        if size == 0 or size % unit:
            step = unit / devices / train.gradient_accumulation
            rule = f"must be a multiple of {step:g} to give every part of the mesh whole examples"
            got = spelled(train.per_device_batch_size)
            yield Problem("train.per_device_batch_size", got, rule)


def _batch_unit(config: Config) -> tuple[int, str]:
    """What the global batch must be a multiple of, and how that is made; 0 where it is unknown."""
    shares = check_mesh.batch_shares(config.mesh, config.hardware)
    if shares is None:
        return 0, ""
    accumulation = config.train.gradient_accumulation
    formula = "mesh data x fsdp" + (" x gradient_accumulation" if accumulation > 1 else "")
    return shares * accumulation, formula


def _neighbours(got: int, unit: int) -> str:
    lower, upper = got // unit * unit, -(-got // unit) * unit
    return f"use {any_of(size for size in (lower, upper) if size)}"


def _names(config: Config) -> Iterator[Problem]:
    name = config.run.name
    if name is not None and not _is_folder_name(name):
        yield Problem("run.name", name, "must be one folder name", "use run.output_dir for a path")
    elif name is not None and (name in _FOLDERS_OF_SWEEPS or name.startswith(".")):
        rule = f"must not be {any_of(_FOLDERS_OF_SWEEPS)}, or begin with a dot"
        yield Problem("run.name", name, rule, "sdx.runs takes that for no run; use another name")
    if not _is_folder_name(config.model.name):  # the folder's name begins with it
        yield Problem("model.name", config.model.name, "must be one folder name")
    if name is not None and len(os.fsencode(name)) > _MAX_NAME_BYTES:
        yield Problem("run.name", name, f"must be at most {_MAX_NAME_BYTES} bytes long")
    if not config.run.output_dir:
        yield Problem("run.output_dir", "''", "must be a folder")
    if config.run.resume_from == "":
        yield Problem("run.resume_from", "''", "must be RUN or RUN@STEP, or null")


def _is_folder_name(name: str) -> bool:
    """On one line, too: logs, tables and scripts hold it."""
    return name not in {"", ".", ".."} and os.path.basename(name) == name and name.isprintable()


def _places(config: Config) -> Iterator[Problem]:
    """What may lie in an object store, and what not."""
    for path in ("run.output_dir", "data.cache_dir"):
        if "://" in (place := value(config, path)) and not place.startswith(_STORES):
            rule = f"must be a local folder or begin with {' or '.join(_STORES)}"
            yield Problem(path, place, rule)
    place = config.run.compilation_cache_dir or ""
    if "://" in place:
        yield Problem("run.compilation_cache_dir", place, "must be a local folder", "mount it")


_RULES: list[Callable[[Config], Iterator[Problem]]] = [
    check_data.data_problems,
    check_cache.cache_problems,
    _length,
    _schedule,
    _diffusion,
    _objective,
    check_attention.attention_problems,
    _sampler,
    _export,
    _evaluation,
    _best,
    _profiler,
    _resolution,
    _weights,
    _architecture,
    check_hardware.hardware_problems,
    check_mesh.mesh_problems,
    _batch,
    _names,
    _places,
]
