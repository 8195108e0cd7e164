"""Files of tensors, read one tensor at a time: safetensors, torch's pickles, and several as one.

Nothing stays mapped between two reads: mapped pages count as this process's memory until the file
is closed, and a model's file is larger than the memory beside a loaded model.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from sdx.record.store import AnyPath
from sdx.weights.errors import WeightsError
from sdx.weights.torch_files import TorchFile

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what may be cast to a parameter
LFS_POINTER = b"version https://git-lfs"
# Loading weights only was escaped from before: CVE-2025-32434 (2.6), CVE-2026-24747 (2.10).
SAFE_TORCH = (2, 10)
# A pickle takes milliseconds to open again, so that is done every so many bytes.
REOPEN_BYTES = 256 << 20


@runtime_checkable
class Tensors(Protocol):
    """Named tensors in torch's layout."""

    @property
    def path(self) -> AnyPath:
        """The file, for messages."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; reads no tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor in the file's own floating-point type; not kept."""
        ...


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """The tensors of a `.safetensors`, `.bin`, `.pth` or `.index.json` file; WeightsError if
    damaged."""
    with ExitStack() as stack:
        if path.suffix == ".json":
            yield _open_index(path, stack)
        elif path.suffix == ".bin":
            pickle = PickleFile(path)
            stack.callback(pickle.close)
            yield pickle
        elif path.suffix in (".pth", ".pt"):
            yield TorchFile(path)
        else:
            yield SafetensorsFile(path)


class SafetensorsFile:
    """One safetensors file, under the names it has; opened again for every tensor (0.8 ms)."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self._shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            self._types = {name: str(s.get_dtype()) for name, s in slices.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return self._shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        if self._types[name] not in FLOATS:
            raise _not_floating(self.path, name, self._types[name])
        with self._open() as file:
            return file.get_tensor(name)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "numpy") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error


class PickleFile:
    """A state dict that torch pickled; only torch >= 2.10 opens it, and only tensors in it."""

    def __init__(self, path: Path):
        check_torch(path)
        self.path = path
        self._tensors = self._open()
        self._bytes_read = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        import torch  # optional, and seconds to import

        if self._bytes_read > REOPEN_BYTES:
            self.close()
            self._tensors, self._bytes_read = self._open(), 0
        tensor = self._tensors[name].detach()
        self._bytes_read += tensor.nbytes
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise _not_floating(self.path, name, str(tensor.dtype))
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type, JAX brings it
            return tensor.view(torch.int16).numpy().copy().view(jnp.bfloat16)
        return tensor.numpy().copy()

    def close(self) -> None:
        """Unmaps the file."""
        self._tensors = {}

    def _open(self) -> dict[str, Any]:
        import torch

        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, KeyError
            raise _damaged(self.path, error) from error
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in found.items()
        ):
            raise WeightsError(
                f"{self.path}: holds more than named tensors; save the model with "
                "safe_serialization=True."
            )
        return found


@dataclass(frozen=True)
class ShardedFiles:
    """Tensors spread over several files by an index."""

    path: Path
    files: dict[str, Tensors]  # name of a tensor -> its file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        files = {file.path: file.shapes() for file in self.files.values()}
        return {name: files[file.path][name] for name, file in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.files[name].read(name)


@dataclass(frozen=True)
class Renamed:
    """Some tensors of a file, under other names: {new name: name in the file}."""

    tensors: Tensors
    names: dict[str, str]

    @property
    def path(self) -> AnyPath:
        return self.tensors.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        shapes = self.tensors.shapes()
        return {name: shapes[old] for name, old in self.names.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.tensors.read(self.names[name])


def check_torch(path: Path) -> None:
    """Raises a WeightsError unless a torch that opens pickles safely is installed."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = None
    if installed is None or tuple(map(int, re.findall(r"\d+", installed)[:2])) < SAFE_TORCH:
        least = ".".join(map(str, SAFE_TORCH))
        raise WeightsError(
            f"{path}: a pickle, which only torch >= {least} opens safely, and "
            f"{f'torch {installed}' if installed else 'no torch'} is installed; install it, or "
            "have the model saved with safe_serialization=True."
        )


def shard_names(index: Path) -> dict[str, str]:
    """{name of a tensor: name of its file beside the index}; WeightsError for any other content."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise WeightsError(f"{index}: has no weight_map, so it is no index of weights.")
    faults = [
        f"{name} is in {shard!r}, which is no file beside the index"
        for name, shard in found.items()
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard)
    ]
    if faults:
        raise WeightsError(f"{index}: {len(faults)} entries cannot be followed:", faults)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; a WeightsError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not an object.")
    return found


def _open_index(path: Path, stack: ExitStack) -> ShardedFiles:
    names = shard_names(path)
    shards = dict.fromkeys(names.values())
    if missing := sorted(shard for shard in shards if not (path.parent / shard).is_file()):
        raise WeightsError(
            f"{path}: {len(missing)} of {len(shards)} files it names are not there; get them:",
            missing,
        )
    files = {shard: stack.enter_context(open_tensors(path.parent / shard)) for shard in shards}
    faults = [
        f"{name} is not in {shard}"
        for name, shard in names.items()
        if name not in files[shard].shapes()
    ]
    if faults:
        raise WeightsError(f"{path}: {len(faults)} tensors are not where it says:", faults)
    return ShardedFiles(path, {name: files[shard] for name, shard in names.items()})


def _damaged(path: Path, error: Exception) -> WeightsError:
    if not path.is_file():
        return WeightsError(f"{path}: not there.")
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return WeightsError(f"{path}: a pointer of Git LFS, not the file; run `git lfs pull`.")
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return WeightsError(f"{path}: damaged or cut short ({reason}); get it again.")


def _not_floating(path: Path, name: str, kind: str) -> WeightsError:
    return WeightsError(
        f"{path}: {name} is stored as {kind}; sdx reads {', '.join(FLOATS)}. Quantised weights "
        "must be saved whole first."
    )
