"""What is written is what was read, whatever lies between: devices, types, memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdx.models.module import Params
from sdx.weights.configs import read_text_encoder_config, read_unet_config, read_vae_config
from sdx.weights.export import (
    DTYPES,
    MODEL_FILE,
    TEXT_ENCODER_FILE,
    ExportError,
    SpecialTokens,
    save_text_encoder,
    save_unet,
    save_vae,
)
from sdx.weights.load import load_text_encoder, load_unet, load_vae
from sdx.weights.model_files import open_model

FILES = {
    "unet": f"unet/{MODEL_FILE}",
    "vae": f"vae/{MODEL_FILE}",
    "text_encoder": f"text_encoder/{TEXT_ENCODER_FILE}",
}
TOKENS = SpecialTokens(bos=53, eos=54, pad=0)


def load_all(reference: Any) -> Params:
    files, networks = reference.files, reference.networks
    return {
        "unet": load_unet(files, networks.unet.abstract()),
        "vae": load_vae(files, networks.vae.abstract()),
        "text_encoder": load_text_encoder(files, networks.text_encoder.abstract()),
    }


def save_all(params: Params, model: Any, folder: Path, dtype: str = "float32") -> None:
    save_unet(params["unet"], model.unet, folder, dtype)
    save_vae(params["vae"], model.vae, folder, dtype, sample_size=16)
    save_text_encoder(params["text_encoder"], model.text_encoder, folder, dtype, tokens=TOKENS)


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        same = second[name]
        assert (tensor.shape, tensor.dtype) == (same.shape, same.dtype), name
        assert tensor.tobytes() == same.tobytes(), name


def test_untouched_tensors_come_back_byte_for_byte(reference: Any, tmp_path: Path) -> None:
    save_all(load_all(reference), reference.model, tmp_path)
    for file in FILES.values():
        assert_same_tensors(reference.folder / file, tmp_path / file)
        with safe_open(tmp_path / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        header_bytes = int.from_bytes((tmp_path / file).read_bytes()[:8], "little")
        assert header_bytes % 8 == 0  # so that mapped tensors are aligned


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_come_back_too(sd2: Any, tmp_path: Path, dtype: str) -> None:
    save_all(load_all(sd2), sd2.model, tmp_path, dtype)
    for file in FILES.values():
        halves = {
            name: tensor.astype(jnp.dtype(dtype))
            for name, tensor in load_file(sd2.folder / file).items()
        }
        save_file(halves, tmp_path / "halves.safetensors")
        assert_same_tensors(tmp_path / "halves.safetensors", tmp_path / file)
    loaded = open_model(str(tmp_path))
    again = load_unet(loaded, sd2.networks.unet.abstract())
    (tmp_path / "again").mkdir()
    save_unet(again, sd2.model.unet, tmp_path / "again", dtype)
    assert_same_tensors(tmp_path / FILES["unet"], tmp_path / "again" / FILES["unet"])


def test_configs_are_read_as_they_were(reference: Any, tmp_path: Path) -> None:
    save_all(load_all(reference), reference.model, tmp_path)
    files, model = open_model(str(tmp_path)), reference.model
    assert read_unet_config(files) == model.unet
    assert read_vae_config(files) == model.vae
    assert read_text_encoder_config(files) == model.text_encoder


def test_sharded_arrays_are_gathered(sd2: Any, tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(leaf: Any) -> Any:
        dims = [dim for dim, size in enumerate(leaf.shape) if size % 8 == 0]
        spec = [None] * leaf.ndim
        if dims:
            spec[dims[-1]] = "fsdp"
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    params = load_text_encoder(sd2.files, sd2.networks.text_encoder.abstract())
    sharded = jax.tree.map(shard, params)
    assert not sharded["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"].is_fully_replicated
    save_text_encoder(sharded, sd2.model.text_encoder, tmp_path, "float32", tokens=TOKENS)
    assert_same_tensors(sd2.folder / FILES["text_encoder"], tmp_path / FILES["text_encoder"])


def test_arrays_come_to_the_host_one_by_one(sd2: Any, tmp_path: Path) -> None:
    params = {str(i): {"kernel": jnp.full((512, 512), i, jnp.float32)} for i in range(16)}
    size = 512 * 512 * 4
    tracemalloc.start()
    save_unet(params, sd2.model.unet, tmp_path, "float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * size
    assert load_file(tmp_path / FILES["unet"])["7.weight"].max() == 7


def test_a_type_that_cannot_hold_the_weights_is_refused(sd2: Any, tmp_path: Path) -> None:
    params = {"conv_in": {"kernel": jnp.full((2, 2), 1e5), "bias": jnp.array([np.inf])}}
    with pytest.raises(ExportError, match="dtype=float16: cannot hold conv_in.weight.* 100000"):
        save_unet(params, sd2.model.unet, tmp_path, "float16")
    for dtype in set(DTYPES) - {"float16"}:
        (tmp_path / dtype).mkdir()
        save_unet(params, sd2.model.unet, tmp_path / dtype, dtype)
