"""A UNet without the rest of a model: `model.unet_checkpoint` where that is files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdx.config.schema import ModelConfig
from sdx.weights.errors import WeightsError
from sdx.weights.folder import CONFIGS, absences, choose_weights
from sdx.weights.model_files import NetworkFiles
from sdx.weights.original import SINGLE_FILES, open_unet_file
from sdx.weights.tensor_files import Tensors, open_tensors, read_json


@dataclass(frozen=True)
class UNetFolder:
    """A folder with a UNet's config.json and weights; a scheduler may lie beside it."""

    source: str
    folder: Path
    weights: Path

    def config(self, component: str) -> dict[str, Any] | None:
        """config.json, or that of the scheduler of the model around it, if there is one."""
        path = self._config_path(component)
        return None if component == "scheduler" and not path.is_file() else read_json(path)

    def where(self, component: str) -> str:
        """The path of that JSON."""
        return str(self._config_path(component))

    @contextmanager
    def tensors(self, component: str) -> Iterator[Tensors]:
        """The UNet's tensors."""
        assert component == "unet"
        with open_tensors(self.weights) as tensors:
            yield tensors

    def _config_path(self, component: str) -> Path:
        beside = self.folder.parent / component
        return (self.folder if component == "unet" else beside) / CONFIGS[component]


def open_unet(source: str, model: ModelConfig) -> NetworkFiles:
    """The UNet at `source`: its folder, a folder with unet/ in it, or a .safetensors file.

    `model` says what a file leaves open of its architecture, and which variant is wanted of a
    folder's weights. Raises WeightsError where there is no UNet.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.suffix in SINGLE_FILES and not path.is_dir()):
        if model.from_files:
            raise WeightsError(
                f"model.from_files=true: {source} does not tell its attention heads, nor other "
                "numbers; choose the model= that it is, with model.from_files=false."
            )
        return open_unet_file(source, path, model)
    folder = path / "unet" if (path / "unet").is_dir() else path
    there = {f"unet/{file.name}" for file in folder.glob("*")} if folder.is_dir() else set()
    weights = choose_weights(there, ["unet"], model.variant)
    faults = list(absences("unet", weights, there))
    if faults:
        raise WeightsError(
            f"model.unet_checkpoint={source}: no UNet there; give its folder, a folder with unet/ "
            "in it, a UNet's .safetensors file, or an sdx run:",
            faults,
        )
    return UNetFolder(source, folder, folder / Path(str(weights["unet"])).name)
