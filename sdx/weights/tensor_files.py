"""Files of tensors, read one tensor at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sdx.weights.errors import WeightsError


@dataclass(frozen=True)
class SafetensorsFile:
    """One safetensors file, under the names it has."""

    path: Path
    file: Any

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the header."""
        return {
            name: tuple(self.file.get_slice(name).get_shape())
            for name in self.file.keys()  # noqa: SIM118 (not a dict)
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.file.get_tensor(name)


@dataclass(frozen=True)
class Renamed:
    """Some tensors of a file, under other names: {new name: name in the file}."""

    tensors: SafetensorsFile
    names: dict[str, str]

    @property
    def path(self) -> Path:
        return self.tensors.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        shapes = self.tensors.shapes()
        return {name: shapes[old] for name, old in self.names.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.tensors.read(self.names[name])


@contextmanager
def open_tensors(path: Path) -> Iterator[SafetensorsFile]:
    """The tensors of `path`; WeightsError where it is damaged, on opening or later."""
    try:
        with safe_open(path, "numpy") as file:
            yield SafetensorsFile(path, file)
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); get it again.") from error
