"""A model in diffusers' layout: a folder for each component, with its config.json and weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdx.weights.errors import WeightsError
from sdx.weights.names import current_name
from sdx.weights.tensor_files import Renamed, open_tensors

COMPONENTS = ("unet", "vae", "text_encoder")
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
CONFIGS = dict.fromkeys(COMPONENTS, "config.json") | {"scheduler": "scheduler_config.json"}


@dataclass(frozen=True)
class DiffusersFolder:
    """The files of one folder, wherever it came from."""

    source: str
    folder: Path
    variant: str | None = None

    def config(self, component: str) -> dict[str, Any]:
        """The JSON beside the component's weights."""
        return read_json(self._config_path(component))

    def where(self, component: str) -> str:
        """The path of that JSON."""
        return str(self._config_path(component))

    @contextmanager
    def tensors(self, component: str) -> Iterator[Renamed]:
        """The component's tensors under today's names."""
        path = _weights_file(self.folder / component, STEMS[component], self.variant)
        with open_tensors(path) as found:
            names = {
                current: name
                for name in found.shapes()
                if (current := current_name(component, name)) is not None
            }
            yield Renamed(found, names)

    def tokenizer_folder(self) -> Path:
        """Vocabulary and merges."""
        return self.folder / "tokenizer"

    def provenance(self) -> dict[str, Any]:
        """Where it lies; local files are not digested."""
        return {"source": self.source, "commit": None, "files": {}}

    def _config_path(self, component: str) -> Path:
        return self.folder / component / CONFIGS[component]


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; a WeightsError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not an object.")
    return found


def _weights_file(folder: Path, stem: str, variant: str | None) -> Path:
    # Without a variant the plain file is read, or the half-precision one where it is all there is.
    names = [f"{stem}.{v}.safetensors" if v else f"{stem}.safetensors" for v in _wanted(variant)]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".safetensors"))
    reason = f"found {', '.join(others)}" if others else "found no weights there"
    if any(folder.glob("*.index.json")):
        reason += "; weights in several files are not read: save them with a larger max_shard_size"
    elif any(name.endswith(".bin") for name in others):
        reason += "; pickles are never opened: save with safe_serialization=True"
    raise WeightsError(f"{folder}: needs {names[0]}; {reason}.")


def _wanted(variant: str | None) -> list[str | None]:
    return [None, "fp16"] if variant is None else [variant]
