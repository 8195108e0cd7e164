"""torch's own files, read without torch."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch

from sdx.weights.errors import WeightsError
from sdx.weights.torch_files import TorchFile

pytestmark = pytest.mark.fast


def tensors() -> dict[str, torch.Tensor]:
    """Every type that is read, a transposed view, two views of one storage, and a counter."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return OrderedDict(
        {
            "linear.weight": torch.nn.Parameter(base.clone()),
            "transposed": base.t(),
            "part": base[1:, 2:],
            "half": base.half(),
            "double": base.double(),
            "brain": base.bfloat16(),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "bn.num_batches_tracked": torch.tensor(7),
        }
    )


@pytest.mark.parametrize("is_archive", [True, False])
def test_tensors_are_torchs(tmp_path: Path, is_archive: bool) -> None:
    path = tmp_path / "model.pth"
    torch.save(tensors(), path, _use_new_zipfile_serialization=is_archive)
    found = TorchFile(path)
    assert found.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    for name, tensor in tensors().items():
        if tensor.is_floating_point():
            array = found.read(name)
            np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double())
    with pytest.raises(WeightsError, match="num_batches_tracked is stored as int64"):
        found.read("bn.num_batches_tracked")


def test_torch_is_not_imported(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pth")
    code = (
        "import sys; from pathlib import Path; from sdx.weights.torch_files import TorchFile; "
        "TorchFile(Path(sys.argv[1])).read('a'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pth"], check=True)


class Attack:
    """Unpickled by an unwary reader, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("is_archive", [True, False])
def test_code_in_a_file_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_archive: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    torch.save({"a": Attack()}, path, _use_new_zipfile_serialization=is_archive)
    with pytest.raises(WeightsError, match="it names posix.mkdir"):
        TorchFile(path)
    assert not (tmp_path / "pwned").exists()


def test_a_tensor_cannot_reach_past_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": torch.ones(4)}, path)
    found = TorchFile(path)
    tensor = found._tensors["a"]
    found._tensors["a"] = type(tensor)(tensor.storage, 0, (5,), (1,))
    with pytest.raises(WeightsError, match="reaches past its numbers"):
        found.read("a")


def pickled(storage: bytes, rest: bytes) -> bytes:
    """A state dict of one tensor `a` of 4 numbers, as opcodes."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\4\x85K\1\x85"
    return b"\x80\2}X\1\0\0\0a" + tensor + rest + b"s."


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
SET_STORAGE = b"tR}X\7\0\0\0storageX\1\0\0\0xsb"  # opcode b: the state of what was built


@pytest.mark.parametrize(
    ("storage", "rest", "said"),
    [
        (b"X\1\0\0\0x", b"tR", "a tensor lies in str"),
        (STORAGE, SET_STORAGE, "cannot be read as torch's state dict"),
    ],
)
def test_what_a_pickle_builds_cannot_be_changed(
    tmp_path: Path, storage: bytes, rest: bytes, said: str
) -> None:
    path = tmp_path / "model.pth"
    archive(path, pickled(STORAGE, b"tR"))
    np.testing.assert_array_equal(TorchFile(path).read("a"), np.zeros(4))
    archive(path, pickled(storage, rest))
    with pytest.raises(WeightsError, match=said):
        TorchFile(path)


def archive(path: Path, data: bytes, compression: int = ZIP_STORED) -> None:
    """A file of torch 1.6 and later with 16 bytes of numbers."""
    with ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", data)
        file.writestr("model/data/0", bytes(16))


def test_an_archive_cannot_unpack_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    archive(path, pickled(STORAGE, b"tR"), ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="its parts are compressed"):
        TorchFile(path)


def test_numbers_for_which_there_is_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    archive(path, pickled(STORAGE, b"tR"))
    found = TorchFile(path)
    tensor = found._tensors["a"]
    found._tensors["a"] = type(tensor)(tensor.storage, 0, (10**7, 10**7), (0, 0))
    with pytest.raises(WeightsError, match="Unable to allocate"):
        found.read("a")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with pytest.raises(WeightsError, match="not there"):
        TorchFile(path)
    path.write_bytes(b"no pickle")
    with pytest.raises(WeightsError, match="cannot be read as torch's state dict"):
        TorchFile(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match="no file of torch.save"):
        TorchFile(path)
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    with pytest.raises(WeightsError, match="more than named tensors"):
        TorchFile(path)
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WeightsError, match="cannot be read"):
        TorchFile(path).read("a")
