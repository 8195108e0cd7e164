"""A UNet alone to start from: `model.unet_checkpoint`, files or the averaged weights of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sdx.config import resolve
from sdx.config.compose import from_saved
from sdx.config.leaves import plain
from sdx.config.schema import Config, ModelConfig
from sdx.models.module import flat
from sdx.record.paths import RunPaths
from sdx.record.store import AnyPath, ObjectPath, as_path
from sdx.training.checkpoint import restore_params
from sdx.weights.errors import WeightsError
from sdx.weights.model_files import NetworkFiles
from sdx.weights.names import array_to_torch, to_torch
from sdx.weights.scheduler import scheduler_config
from sdx.weights.unet_alone import open_unet


@dataclass(frozen=True)
class ParameterTensors:
    """Parameters of a run under their names in torch, in its layout."""

    path: AnyPath
    arrays: dict[str, np.ndarray]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: array.shape for name, array in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.arrays[name]


@dataclass(frozen=True)
class RunUNet:
    """The UNet of a run's newest checkpoint, averaged where the run keeps averages."""

    source: str
    paths: RunPaths

    @cached_property
    def saved(self) -> Config:
        """The run's configuration."""
        return from_saved(self.paths.config)

    def config(self, component: str) -> dict[str, Any] | None:
        """The UNet's architecture, or what it learnt with, as configs of files have it."""
        saved = self.saved
        if component == "scheduler":
            learnt = resolve.prediction_type(saved)
            return scheduler_config(saved.diffusion, learnt, resolve.sampler_kind(saved))
        return {key: plain(value) for key, value in vars(saved.model.unet).items()}

    def where(self, component: str) -> str:
        """The run's config.yaml."""
        return str(self.paths.config)

    @contextmanager
    def tensors(self, component: str) -> Iterator[ParameterTensors]:
        """The UNet's tensors; the checkpoint is read whole."""
        which = "ema" if self.saved.train.ema else "params"
        _, params = restore_params(self.paths.checkpoints, which, say=print)
        yield ParameterTensors(
            self.paths.checkpoints,
            {
                to_torch(path): array_to_torch(path, array)
                for path, array in flat(params["unet"]).items()
            },
        )


def open_unet_checkpoint(source: str, model: ModelConfig) -> NetworkFiles:
    """The UNet that `model.unet_checkpoint` names; WeightsError where there is none."""
    paths = RunPaths(as_path(source))
    if not paths.config.is_file():
        if isinstance(paths.root, ObjectPath):
            raise WeightsError(
                f"model.unet_checkpoint={source}: no run of sdx; files are read from a local path."
            )
        return open_unet(source, model)
    if not any(path.name.isdigit() for path in paths.checkpoints.glob("*")):
        raise WeightsError(
            f"model.unet_checkpoint={source}: this run has no checkpoint; give one that has."
        )
    files = RunUNet(source, paths)
    if files.saved.train.text_encoder:
        print(
            f"{source}: trained its text encoder too, which is not read; run.resume_from keeps it"
        )
    return files
