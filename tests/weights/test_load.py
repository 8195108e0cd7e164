"""Folders that load, folders that must not, and what is said about them."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sdx.models.module import flat
from sdx.weights.configs import read_prediction_type
from sdx.weights.errors import SHOWN, WeightsError
from sdx.weights.folder import COMPONENTS, read_json
from sdx.weights.load import check_tensors, load_text_encoder, load_unet, load_vae
from sdx.weights.model_files import open_model

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def folder(sd2: Any, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sd2.folder, tmp_path / "model"))


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    save_file(change(tensors), path)


def assert_equal(one: Any, other: Any) -> None:
    for path, value in flat(one).items():
        np.testing.assert_array_equal(value, flat(other)[path], err_msg="/".join(path))


def test_both_dialects_load_alike(sd2: Any, folder: Path) -> None:
    def old_vae(tensors: dict[str, Any]) -> dict[str, Any]:
        pattern = re.compile(r"(mid_block\.attentions\.0)\.(to_q|to_k|to_v|to_out\.0)\.")
        return {
            pattern.sub(lambda m: f"{m[1]}.{OLD_VAE[m[2]]}.", name): tensor
            for name, tensor in tensors.items()
        }

    def old_text(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors = {
            f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()
        }
        projection = {"text_projection.weight": np.ones((8, 24), np.float32)}
        return tensors | projection | {"text_model.embeddings.position_ids": np.arange(77)[None]}

    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", old_vae)
    rewrite(folder / "text_encoder/model.safetensors", old_text)
    vae, text = sd2.networks.vae.abstract(), sd2.networks.text_encoder.abstract()
    assert_equal(load_vae(open_model(str(folder)), vae), load_vae(sd2.files, vae))
    assert_equal(
        load_text_encoder(open_model(str(folder)), text), load_text_encoder(sd2.files, text)
    )


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_files_are_cast(sd2: Any, folder: Path, dtype: Any) -> None:
    abstract = sd2.networks.unet.abstract()
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    (folder / UNET_FILE).rename(half)
    rewrite(half, lambda tensors: {name: t.astype(dtype) for name, t in tensors.items()})
    files = open_model(str(folder), variant="fp16", say=lambda line: None)
    loaded, exact = load_unet(files, abstract), load_unet(sd2.files, abstract)
    for path, value in flat(loaded).items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, flat(exact)[path], rtol=1e-2, atol=1e-6)


def test_arrays_land_where_they_are_wanted(sd2: Any) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding),
        sd2.networks.vae.abstract(),
    )
    for value in flat(load_vae(sd2.files, abstract)).values():
        assert (value.dtype, value.sharding) == (jnp.bfloat16, sharding)


def test_every_device_gets_its_own_part(sd2: Any) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ["x"])

    def halved(leaf: Any) -> Any:
        spec = jax.sharding.PartitionSpec(*[None] * (len(leaf.shape) - 1), "x")
        place = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    abstract = sd2.networks.text_encoder.abstract()
    whole = flat(load_text_encoder(sd2.files, abstract))
    for path, value in flat(load_text_encoder(sd2.files, jax.tree.map(halved, abstract))).items():
        assert {shard.data.shape[-1] for shard in value.addressable_shards} == {value.shape[-1] / 2}
        np.testing.assert_array_equal(value, whole[path])


def test_all_faults_are_told_at_once(sd2: Any, folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors["conv_out.bias"]
        tensors["class_embedding.weight"] = np.zeros((3, 3), np.float32)
        tensors["conv_in.weight"] = np.zeros((16, 9, 3, 3), np.float32)
        return tensors

    rewrite(folder / UNET_FILE, change)
    with pytest.raises(WeightsError) as error:
        load_unet(open_model(str(folder)), sd2.networks.unet.abstract())
    assert error.value.faults == [
        "conv_out.bias is missing in the file",
        "class_embedding.weight is in the file, but not in the model",
        "conv_in.kernel is (3, 3, 9, 16) in the file, (3, 3, 4, 16) in the model",
    ]
    assert "9 input channels mean an inpainting checkpoint" in str(error.value)
    assert UNET_FILE in str(error.value)


def test_all_components_are_looked_at(sd2: Any, folder: Path) -> None:
    check_tensors(sd2.files, sd2.model, COMPONENTS)
    for component in ("unet", "vae"):
        file = folder / component / "diffusion_pytorch_model.safetensors"
        rewrite(file, lambda tensors: {n: t for n, t in tensors.items() if n != "conv_out.bias"})
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError) as error:
        check_tensors(open_model(str(folder)), sd2.model, COMPONENTS)
    assert "conv_out.bias is missing in the file" in str(error.value)
    assert "vae/diffusion_pytorch_model.safetensors: damaged or cut short" in str(error.value)


def test_a_long_list_of_faults_is_cut(sd2: Any, folder: Path) -> None:
    rewrite(folder / UNET_FILE, lambda tensors: {f"lora.{n}": t for n, t in tensors.items()})
    with pytest.raises(WeightsError, match="LoRA adapter") as error:
        load_unet(open_model(str(folder)), sd2.networks.unet.abstract())
    count = 2 * len(flat(sd2.networks.unet.abstract()))
    assert len(error.value.faults) == count
    assert f"and {count - SHOWN} more" in str(error.value)
    assert len(str(error.value).splitlines()) < SHOWN + 6


def test_a_1x_file_in_a_2x_model(tmp_path: Path, sd2: Any, folder: Path) -> None:
    def one_by_one(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: t[..., None, None] if re.search(r"proj_(in|out)\.weight", name) else t
            for name, t in tensors.items()
        }

    rewrite(folder / UNET_FILE, one_by_one)
    with pytest.raises(WeightsError, match="use_linear_projection=false"):
        load_unet(open_model(str(folder)), sd2.networks.unet.abstract())


def test_a_file_cut_short(sd2: Any, folder: Path) -> None:
    path = folder / UNET_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        load_unet(open_model(str(folder)), sd2.networks.unet.abstract())


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_unreadable_json(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        read_json(path)


def test_scheduler_config(sd2: Any) -> None:
    assert read_prediction_type(sd2.files).name == "v_prediction"
