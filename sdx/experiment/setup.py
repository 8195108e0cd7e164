"""What a run needs and the machine has, found out without writing anything.

Whatever is wrong here refuses the start (exit code 2): devices, data, the model's folder, batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax.sharding import Mesh

from sdx.config import resolve
from sdx.config.check_attention import sequence_problems
from sdx.config.errors import ConfigError
from sdx.config.identity import run_folder_name
from sdx.config.schema import (
    Config,
    DataConfig,
    DataKind,
    Init,
    ModelConfig,
    OptimizerKind,
    WeightsDtype,
)
from sdx.data.buckets import Buckets, make_buckets
from sdx.data.source import DataError, Source
from sdx.data.sources.open import open_source
from sdx.data.tokenizer import Tokenizer, load_tokenizer
from sdx.experiment.adopt import adopt
from sdx.experiment.caching import training_source
from sdx.experiment.compilation_cache import use_compilation_cache
from sdx.experiment.publishing import check_can_publish
from sdx.experiment.unet_checkpoint import RunUNet, open_unet_checkpoint
from sdx.experiment.validating import open_validation
from sdx.parallel.agreement import is_first
from sdx.parallel.mesh import MeshError, claim_devices, make_mesh
from sdx.parallel.place import ProcessesError
from sdx.record.files import DamagedRecord, read_json
from sdx.record.lock import RefusedStart
from sdx.record.paths import RunPaths
from sdx.record.provenance import data_commit, weights_commit
from sdx.record.store import StoreError, as_path
from sdx.training.program import BatchError, check_batch
from sdx.training.sinks import SinkError, check_sinks
from sdx.weights.configs import check_model
from sdx.weights.errors import WeightsError
from sdx.weights.export import ExportError
from sdx.weights.folder import COMPONENTS
from sdx.weights.load import check_tensors
from sdx.weights.model_files import ModelFiles, NetworkFiles, open_model
from sdx.weights.scheduler import schedule_differences

REFUSALS = (
    ProcessesError, MeshError, DataError, WeightsError, ExportError, BatchError, SinkError,
    RefusedStart, DamagedRecord, StoreError,
)  # fmt: skip

FROZEN = ("vae", "text_encoder")  # what is read of a model whose UNet comes from elsewhere

# Orbax and TensorStore take a backslash for a slash, and brackets for a pattern when they restore.
_UNREADABLE = frozenset("\\[]")


@dataclass(frozen=True)
class Setup:
    """A configuration that this machine can run; `config` holds the resolved global batch."""

    config: Config
    mesh: Mesh
    source: Source
    validation: Source | None
    """What the validation loss is measured on; None with eval.every=null."""
    tokenizer: Tokenizer
    weights: ModelFiles
    """The model: autoencoder and text encoder, and the UNet where nothing else is said of it."""
    unet: NetworkFiles | None
    """What the UNet is read from; None where it starts from random."""
    max_steps: int
    paths: RunPaths
    buckets: Buckets | None
    """The shapes of training images where they are not squares."""


def prepare(config: Config) -> Setup:
    """Looks at devices, data and weights; raises a ConfigError or one of `REFUSALS` with what is
    wrong."""
    root = run_paths(config).root
    root.exists()  # first of all, whether a store can be reached
    use_compilation_cache(config.run.compilation_cache_dir)
    claim_devices(config.hardware)
    mesh = make_mesh(config.mesh, config.hardware)
    config = resolve.with_global_batch(config, mesh.size)
    check_batch(config, mesh, resolve.global_batch_size(config))
    check_sinks(config.metrics.sinks, keeps_files="://" not in config.run.output_dir)
    if config.export.push_to_hub and config.export.hub_model_id is not None and is_first():
        check_can_publish(config.export.hub_model_id)  # not when the training is done
    weights, unet = open_weights(_at_recorded_commit(config))
    if config.model.from_files:
        adopted = adopt(config, weights, unet)
        # Without run.name the files name the run's folder; only then its record names the commit.
        began = _at_recorded_commit(adopted).revision
        if began not in (None, config.model.revision, weights.provenance()["commit"]):
            at_commit = replace(config.model, revision=began)
            weights, unet = open_weights(at_commit)
            adopted = adopt(config, weights, unet)
        config = adopted
    if odd := [*sequence_problems(config, mesh.shape["tensor"])]:
        raise ConfigError(odd)  # `check` does not know the devices of a bare gpu or tpu
    check_weights(config, weights, unet)
    tokenizer = open_tokenizer(config, weights)
    data = data_at_recorded_commit(config)
    source = open_source(data, resolution=resolve.resolution(config))
    validation = open_validation(replace(config, data=_at_commit_of(source, data)), source)
    source = training_source(config, source, weights)
    buckets = open_buckets(config, source)
    return Setup(
        config=config,
        mesh=mesh,
        source=source,
        validation=validation,
        tokenizer=tokenizer,
        weights=weights,
        unet=unet,
        max_steps=resolve.max_steps(
            config,
            len(source),
            steps_per_epoch=buckets and sum(buckets.num_batches(resolve.global_batch_size(config))),
        ),
        paths=run_paths(config),
        buckets=buckets,
    )


def open_buckets(config: Config, source: Source) -> Buckets | None:
    """The buckets of `source`; None where `data.buckets` is off."""
    if not config.data.buckets:
        return None
    multiple = resolve.vae_factor(config) * resolve.unet_factor(config)
    return make_buckets(source, resolve.resolution(config), multiple)


def data_at_recorded_commit(config: Config) -> DataConfig:
    """The dataset as it was when the run began."""
    data = config.data
    if data.kind is not DataKind.huggingface or data.dir is not None or data.revision is not None:
        return data
    commit = data_commit(read_json(run_paths(config).run), data.name)
    return replace(data, revision=commit)


def _at_commit_of(source: Source, data: DataConfig) -> DataConfig:
    """The dataset at the commit of `source`, for its other splits."""
    commit = getattr(source, "provenance", {}).get("commit")
    return data if commit is None else replace(data, revision=commit)


def _at_recorded_commit(config: Config) -> ModelConfig:
    """The model as it was when the run began: a branch on the Hub moves."""
    model = config.model
    commit = weights_commit(read_json(run_paths(config).run), model.pretrained)
    return model if model.revision is not None else replace(model, revision=commit)


def open_weights(model: ModelConfig) -> tuple[ModelFiles, NetworkFiles | None]:
    """Files of the model, and those of its UNet unless it starts from random."""
    reads_unet = model.init is Init.pretrained
    is_alone = model.unet_checkpoint is not None
    weights = open_model(
        model.pretrained,
        revision=model.revision,
        variant=model.variant,
        components=[c for c in COMPONENTS if c != "unet" or (reads_unet and not is_alone)],
        model=None if model.from_files else model,
    )
    if not reads_unet:
        return weights, None
    alone = model.unet_checkpoint
    return weights, weights if alone is None else open_unet_checkpoint(alone, model)


def open_tokenizer(config: Config, weights: ModelFiles) -> Tokenizer:
    """The model's tokenizer; DataError where it does not fit the text encoder."""
    text_encoder = config.model.text_encoder
    return load_tokenizer(
        weights.tokenizer_folder(),
        max_length=text_encoder.max_position_embeddings,
        num_embeddings=text_encoder.vocab_size,
    )


def check_weights(config: Config, weights: ModelFiles, unet: NetworkFiles | None) -> None:
    """Raises a WeightsError where files and configuration disagree on what must agree."""
    sources: list[tuple[NetworkFiles, Sequence[str]]] = [(weights, COMPONENTS)]
    if unet is not weights:
        sources = [(weights, FROZEN), *([] if unet is None else [(unet, ["unet"])])]
    for files, components in sources:
        check_model(files, config.model, components)
    for files, components in sources:
        if not isinstance(files, RunUNet):  # its configuration says all
            check_tensors(files, config.model, components)
    scheduler = None if unet is None else unet.config("scheduler")
    if unet is not None and scheduler is not None:
        for difference in schedule_differences(scheduler, config.diffusion):
            print(f"{difference} in {unet.where('scheduler')}: training goes on with the first")


def lost_precision(config: Config) -> str | None:
    """What is said of weights that are rounded to few bits after every update; None where none are.

    Measured on a toy, 3,000 updates at 1e-4: 89 % of the weights were where they began.
    """
    if config.model.weights_dtype is WeightsDtype.float32:
        return None
    return (
        "model.weights_dtype=bfloat16: a change below 1/512 of a weight is lost, so that many never"
        " move at usual learning rates, nor does their average. float32 keeps them, and"
        " model.activations_dtype=bfloat16 computes as fast."
    )


def departure(config: Config) -> str | None:
    """What is said of a run that computes something else than diffusers would; None of others."""
    if not config.attention.mask_padding_tokens:
        return None
    return (
        "attention.mask_padding_tokens=true: cross-attention passes over what follows a caption's "
        "end, which diffusers attends to; its pictures of an export of this run will be others"
    )


def bold_rate(config: Config) -> str | None:
    """What is said of an optimizer whose learning rates are not AdamW's; None where they are."""
    if config.optimizer.kind is not OptimizerKind.lion:
        return None
    return (
        f"optimizer=lion moves every weight by the whole rate, optimizer.lr={config.optimizer.lr:g}"
        ", at each update: AdamW's rates are 3 to 10 times too large for it"
    )


def run_paths(config: Config) -> RunPaths:
    """Where the run lies; RefusedStart for a path that its checkpoints could not be read from."""
    paths = RunPaths(as_path(config.run.output_dir) / run_folder_name(config))
    if unsafe := sorted(_UNREADABLE & set(str(paths.root.absolute()))):
        raise RefusedStart(
            f"{paths.root.absolute()}: holds {' and '.join(unsafe)}, checkpoints could not be read "
            "from there; use another run.name or run.output_dir."
        )
    return paths
