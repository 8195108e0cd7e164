"""State dicts as `torch.save` writes them (.pth), read without torch and without running any code.

A pickle may name any function to call. The reader here knows a few names (`STORAGES`, `_KNOWN`) and
refuses a file with any other; it builds nothing but records of where a tensor's numbers lie, which
cannot be changed once built, and checks those against the file. Archives that unpack to more than
they are (torch compresses nothing) are refused. Both of torch's formats are read: the archive of
1.6 and later (torch/serialization.py, `_save`), and the row of pickles before it (`_legacy_save`).
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import jax.numpy as jnp
import numpy as np

from sdx.weights.errors import WeightsError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # torch/serialization.py
_LENGTH_BYTES = 8  # the number of elements before each storage of the old format
# Types that a storage may be of; tensors of the others are not read, but may be in the file.
STORAGES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}


class _Storage(NamedTuple):
    """A row of numbers in the file."""

    key: str
    dtype: np.dtype[Any]
    length: int


class _Stored(NamedTuple):
    """A tensor: which numbers of a storage, in which order."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The tensors of one .pth file; see `tensor_files.Tensors`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._is_archive = is_zipfile(file)
                file.seek(0)
                found, self._starts = _read_archive(file) if self._is_archive else _read_row(file)
        except Exception as error:  # unpickling bytes of any kind raises errors of any kind
            raise _unreadable(path, error) from error
        self._tensors = {name: value for name, value in found.items() if _is_named(name, value)}
        if not self._tensors or len(self._tensors) < len(found):
            raise WeightsError(
                f"{path}: holds more than named tensors; save the model's state_dict() alone."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        if dtype.kind not in "fV":  # bfloat16 is of kind V
            raise WeightsError(f"{self.path}: {name} is stored as {dtype}, must be floats.")
        try:
            return _shaped(tensor, np.frombuffer(self._bytes(tensor.storage), dtype))
        except Exception as error:  # as above: of zipfile, zlib, numpy, or no memory for that much
            raise _unreadable(self.path, error) from error

    def _bytes(self, storage: _Storage) -> bytes:
        num_bytes = storage.length * storage.dtype.itemsize
        if self._is_archive:
            with ZipFile(self.path) as archive:
                return archive.read(f"{self._starts['']}/data/{storage.key}")
        with self.path.open("rb") as file:
            file.seek(self._starts[storage.key])
            return file.read(num_bytes)


def _read_archive(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object, and {"": the folder in the archive}."""
    with ZipFile(file) as archive:
        if any(part.compress_type != ZIP_STORED for part in archive.infolist()):
            raise ValueError("its parts are compressed, torch stores them as they are")
        names = [name for name in archive.namelist() if name.count("/") == 1]
        (pickled,) = (name for name in names if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("/data.pkl")
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(pickled) as part:
            return dict(_Unpickler(part).load()), {"": folder}


def _read_row(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object, and where the numbers of each storage begin."""
    if _Unpickler(file).load() != MAGIC_NUMBER:
        raise ValueError("no file of torch.save")
    for _ in range(2):  # protocol version, machine
        _Unpickler(file).load()
    reader = _Unpickler(file)
    found, keys = dict(reader.load()), _Unpickler(file).load()
    starts, start = {}, file.tell()
    for key in keys:
        storage = reader.storages[key]
        starts[key] = start + _LENGTH_BYTES
        start = starts[key] + storage.length * storage.dtype.itemsize
    return found, starts


class _Unpickler(pickle.Unpickler):
    """Builds dicts, tuples, texts, numbers, and what `_KNOWN` names."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """What a name in the file stands for."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no state dict needs")

    def persistent_load(self, pid: Any, /) -> _Storage:
        """A storage as the file refers to it; views of storages, which 0.4 had, are refused."""
        kind, dtype, key, _, length, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        if not str(key).isalnum():
            raise pickle.UnpicklingError(f"it names its numbers {key!r}")
        return self.storages.setdefault(str(key), _Storage(str(key), dtype, int(length)))


def _rebuild_tensor(
    storage: object, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Stored:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"a tensor lies in {type(storage).__name__}")
    return _Stored(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor: _Stored, *_: Any) -> _Stored:
    return tensor


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _is_named(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, _Stored)


def _shaped(tensor: _Stored, numbers: np.ndarray) -> np.ndarray:
    """A copy of the tensor's numbers; ValueError where it would reach past them."""
    steps = list(zip(tensor.shape, tensor.strides, strict=True))
    if tensor.offset < 0 or any(size < 0 or stride < 0 for size, stride in steps):
        raise ValueError("a tensor lies before its numbers")
    if 0 in tensor.shape:
        return np.empty(tensor.shape, numbers.dtype)
    if tensor.offset + sum((size - 1) * stride for size, stride in steps) >= len(numbers):
        raise ValueError("a tensor reaches past its numbers")
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
    return view.copy()


def _unreadable(path: Path, error: Exception) -> WeightsError:
    if not path.is_file():
        return WeightsError(f"{path}: not there; give the path of a .pth or .safetensors file.")
    reason = str(error) or type(error).__name__
    return WeightsError(f"{path}: cannot be read as torch's state dict ({reason}); get it again.")
