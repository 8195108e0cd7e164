"""What a run needs and the machine has, found out without writing anything.

Whatever is wrong here refuses the start (exit code 2): devices, data, the model's folder, batch.
"""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from sdx.config import resolve
from sdx.config.identity import run_folder_name
from sdx.config.schema import Config, Init
from sdx.data.loader import open_source
from sdx.data.source import DataError, FirstExamples, Source
from sdx.data.tokenizer import Tokenizer, load_tokenizer
from sdx.experiment.compilation_cache import use_compilation_cache
from sdx.parallel.mesh import MeshError, claim_devices, make_mesh
from sdx.record.files import DamagedRecord
from sdx.record.lock import RefusedStart
from sdx.record.paths import RunPaths
from sdx.training.program import BatchError, check_batch
from sdx.weights.configs import check_model
from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS
from sdx.weights.load import check_tensors
from sdx.weights.model_files import ModelFiles, open_model

REFUSALS = (MeshError, DataError, WeightsError, BatchError, RefusedStart, DamagedRecord)

# Orbax and TensorStore take a backslash for a slash, and brackets for a pattern when they restore.
_UNREADABLE = frozenset("\\[]")


@dataclass(frozen=True)
class Setup:
    """A configuration that this machine can run; `config` holds the resolved global batch."""

    config: Config
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer
    weights: ModelFiles
    """The model: UNet (unless it starts from random), autoencoder, text encoder."""
    max_steps: int
    paths: RunPaths


def prepare(config: Config) -> Setup:
    """Looks at devices, data and weights; raises one of `REFUSALS` with what is wrong."""
    use_compilation_cache(config.run.compilation_cache_dir)
    claim_devices(config.hardware)
    mesh = make_mesh(config.mesh, config.hardware)
    config = resolve.with_global_batch(config, mesh.size)
    check_batch(config, mesh, resolve.global_batch_size(config))
    reads_unet = config.model.init is Init.pretrained
    components = [c for c in COMPONENTS if reads_unet or c != "unet"]
    weights = open_model(
        config.model.pretrained,
        revision=config.model.revision,
        variant=config.model.variant,
        components=components,
    )
    check_model(weights, config.model, reads_unet=reads_unet)
    check_tensors(weights, config.model, components)
    length = config.model.text_encoder.max_position_embeddings
    tokenizer = load_tokenizer(weights.tokenizer_folder(), max_length=length)
    source = open_source(config.data, resolution=resolve.resolution(config))
    if config.train.max_samples is not None:
        source = FirstExamples(source, config.train.max_samples)
    return Setup(
        config=config,
        mesh=mesh,
        source=source,
        tokenizer=tokenizer,
        weights=weights,
        max_steps=resolve.max_steps(config, len(source)),
        paths=run_paths(config),
    )


def run_paths(config: Config) -> RunPaths:
    """Where the run lies; RefusedStart for a path that its checkpoints could not be read from."""
    paths = RunPaths(Path(config.run.output_dir).expanduser() / run_folder_name(config))
    if unsafe := sorted(_UNREADABLE & set(str(paths.root.absolute()))):
        raise RefusedStart(
            f"{paths.root.absolute()}: holds {' and '.join(unsafe)}, checkpoints could not be read "
            "from there; use another run.name or run.output_dir."
        )
    return paths
