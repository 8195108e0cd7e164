"""The validation loss of a run's checkpoint, on whatever devices are here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jax.sharding import Mesh

from sdx.config import resolve
from sdx.config.schema import (
    AttentionKind,
    Config,
    HardwareConfig,
    MeshAxes,
    MeshConfig,
    Platform,
    Remat,
)
from sdx.data.source import DataError, Source, first_examples
from sdx.data.sources.open import open_source
from sdx.parallel import sharding
from sdx.pipeline import Pipeline
from sdx.training.evaluation import check_buckets, evaluation_data, make_evaluator, num_measured
from sdx.training.program import build

Say = Callable[[str], None]


def measure_loss(
    config: Config,
    pipeline: Pipeline,
    *,
    split: str | None,
    num_batches: int | None,
    batch_size: int,
    trained_on: str | None,
    say: Say,
) -> dict[str, Any]:
    """The loss of `pipeline`, a checkpoint of the run of `config`, with that run's own `eval.*`.

    `split` and `num_batches` take the place of the run's; a batch is the run's global batch, also
    where fewer examples fit here at once. `trained_on` is the fingerprint of the run's examples.
    Raises DataError where the split cannot be opened.
    """
    split = config.eval.split if split is None else split
    num_batches = config.eval.num_batches if num_batches is None else num_batches
    source = _open(config, split, say)
    if source.fingerprint == trained_on:
        say(f"{split}: the run was trained on these very examples")
    num_examples = num_measured(source, num_batches, resolve.global_batch_size(config))
    check_buckets(num_examples, config.diffusion.num_train_timesteps, config.eval.num_buckets)
    data = evaluation_data(config.data, split)
    here = replace(_on_this_machine(config, pipeline.mesh, batch_size), data=data)
    program = build(here, pipeline.mesh, max_steps=1)
    frozen = {name: pipeline.params[name] for name in program.abstract_frozen}
    trained = {name: pipeline.params[name] for name in program.abstract_state.params}
    evaluator = make_evaluator(
        program,
        program.place_frozen(**frozen),
        first_examples(source, num_examples),  # a batch here may reach past the last one
        pipeline.tokenizer,
        data,
        resolution=resolve.resolution(config),
        num_examples=num_examples,
        num_buckets=config.eval.num_buckets,
    )
    measured = evaluator(trained)
    assert measured is not None, "nothing asks it to stop"
    if evaluator.bad_images:
        say(f"left out {len(evaluator.bad_images)} examples that cannot be read")
    return {
        "loss": measured.loss,
        "by_bucket": list(measured.by_bucket),
        "num_timesteps": config.diffusion.num_train_timesteps,
        "split": split,
        "num_examples": measured.num_examples,
        "fingerprint": source.fingerprint,
    }


def _open(config: Config, split: str, say: Say) -> Source:
    data = evaluation_data(config.data, split)
    try:
        return open_source(data, resolution=resolve.resolution(config), say=say)
    except ValueError as error:
        raise DataError(
            f"--split {split}: cannot be opened ({error}); give a split that the data has, or a "
            "part of one such as 'train[95%:]'."
        ) from error


def _on_this_machine(config: Config, mesh: Mesh, batch_size: int) -> Config:
    """The run's configuration as far as its loss goes, for the devices of `mesh`."""
    devices = sharding.batch_divisor(mesh)
    platform = Platform[mesh.devices.flat[0].platform]
    train = replace(
        config.train,
        global_batch_size=-(-batch_size // devices) * devices,
        gradient_accumulation=1,
        remat=Remat.none,
        ema=False,
    )
    return replace(
        config,
        train=train,
        attention=replace(config.attention, kind=AttentionKind.auto),
        mesh=MeshConfig(ici=MeshAxes(data=devices, fsdp=1, tensor=1)),
        hardware=HardwareConfig(name="here", platform=platform, num_devices=devices),
    )
