"""Which files of a folder are read, and what is said of folders that are no model of ours."""

import json
from pathlib import Path

import pytest

from sdx.weights.errors import WeightsError
from sdx.weights.folder import check_weights, list_files, open_folder
from sdx.weights.model_files import open_model

pytestmark = pytest.mark.fast

UNET, TEXT = "diffusion_pytorch_model", "model"


def lay(folder: Path, **components: list[str]) -> Path:
    """Empty files; every component has its config."""
    for component, names in components.items():
        (folder / component).mkdir(parents=True)
        for name in ["config.json", *names]:
            (folder / component / name).write_text("{}")
    return folder


def chosen(folder: Path, variant: str | None = None) -> dict[str, str]:
    return open_folder("it", folder, variant=variant, say=lambda line: None).weights


PLAIN = {"vae": [f"{UNET}.safetensors"], "text_encoder": [f"{TEXT}.safetensors"]}


@pytest.mark.parametrize(
    ("variant", "names", "read"),
    [
        (None, [f"{UNET}.bin", f"{UNET}.fp16.safetensors", f"{UNET}.safetensors"], 2),
        (None, [f"{UNET}.bin", f"{UNET}.safetensors.index.json"], 1),
        (None, [f"{UNET}.fp16.safetensors", f"{UNET}.bin"], 1),
        ("fp16", [f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], 1),
        ("fp16", [f"{UNET}.fp16.bin", f"{UNET}.safetensors.index.fp16.json"], 1),
        ("fp16", [f"{UNET}.safetensors.fp16.index.json", f"{UNET}.safetensors"], 0),
        ("non_ema", [f"{UNET}.safetensors", f"{UNET}.non_ema.safetensors"], 1),
    ],
)
def test_one_of_many_files(
    tmp_path: Path, variant: str | None, names: list[str], read: int
) -> None:
    folder = lay(tmp_path, unet=names, **PLAIN)
    assert chosen(folder, variant) == {
        "unet": f"unet/{names[read]}",
        "vae": f"vae/{UNET}.safetensors",
        "text_encoder": f"text_encoder/{TEXT}.safetensors",
    }


def test_components_without_the_variant_are_told(tmp_path: Path) -> None:
    folder = lay(tmp_path, unet=[f"{UNET}.fp16.safetensors"], **PLAIN)
    said = []
    open_folder("it", folder, variant="fp16", say=said.append)
    assert said == [
        f"it: vae has no variant fp16; reading vae/{UNET}.safetensors",
        f"it: text_encoder has no variant fp16; reading text_encoder/{TEXT}.safetensors",
    ]


def test_a_variant_that_nothing_has(tmp_path: Path) -> None:
    folder = lay(tmp_path, unet=[f"{UNET}.fp16.safetensors", f"{UNET}.safetensors"], **PLAIN)
    with pytest.raises(WeightsError, match="model.variant=bf16: it has no such files") as error:
        chosen(folder, "bf16")
    assert f"unet/{UNET}.fp16.safetensors" in str(error.value)
    assert "config.json" not in str(error.value)


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    folder = lay(tmp_path, unet=[f"{UNET}.fp16-00001-of-00002.safetensors"], text_encoder=["x.bin"])
    (folder / "text_encoder" / "config.json").unlink()
    with pytest.raises(WeightsError) as error:
        chosen(folder)
    assert error.value.faults == [
        f"unet/{UNET}.safetensors is missing; found only model.variant=fp16",
        "vae/ is missing",
        "text_encoder/config.json is missing",
        f"text_encoder/{TEXT}.safetensors is missing; found x.bin there",
    ]


def test_weights_of_flax(tmp_path: Path) -> None:
    folder = lay(tmp_path, unet=["diffusion_flax_model.msgpack"], **PLAIN)
    with pytest.raises(WeightsError, match="msgpack is not read: save the model with PyTorch"):
        chosen(folder)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("config.yaml", "an sdx run: give its export"),
        ("pytorch_lora_weights.safetensors", "a LoRA adapter"),
        (f"{UNET}.safetensors", "model.unet_checkpoint"),
        ("v2-1_768-ema-pruned.safetensors", "given by its own path"),
        ("sd-v1-4.ckpt", "convert it"),
        ("unet_ema", "a checkpoint of diffusers' trainer"),
        ("transformer", "Stable Diffusion 3"),
    ],
)
def test_other_folders(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).write_text("")
    with pytest.raises(WeightsError, match=hint):
        chosen(tmp_path)


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        ("StableDiffusionXLPipeline", "is Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", "is Stable Diffusion 3"),
        ("StableDiffusionInpaintPipeline", "an inpainting model"),
        ("StableDiffusionDepth2ImgPipeline", "a depth-to-image model"),
        ("StableDiffusionUpscalePipeline", "an upscaler"),
        ("StableDiffusionInstructPix2PixPipeline", "an image-editing model"),
        ("StableUnCLIPPipeline", "Stable unCLIP"),
    ],
)
def test_other_pipelines(tmp_path: Path, pipeline: str, what: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(WeightsError, match=what):
        chosen(tmp_path)


def test_image_to_image_is_the_same_model(tmp_path: Path) -> None:
    folder = lay(tmp_path, unet=[f"{UNET}.safetensors"], **PLAIN)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionImg2ImgPipeline"}')
    assert set(chosen(folder)) == {"unet", "vae", "text_encoder"}


@pytest.mark.parametrize("source", ["/nowhere/at/all", "../nothing", "a/b/c", "model"])
def test_sources_that_are_nothing(source: str) -> None:
    with pytest.raises(WeightsError, match="no such folder"):
        open_model(source)


def test_folders_have_no_revision(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.revision=main: .* leave it null"):
        open_model(str(tmp_path), revision="main")


def test_the_embedded_model_has_no_unet() -> None:
    files = open_model("tiny", components=["vae", "text_encoder"])
    assert files.provenance() == {"source": "tiny", "commit": None, "files": {}}
    assert files.tokenizer_folder().parts[-3:] == ("assets", "tiny", "tokenizer")
    with pytest.raises(WeightsError, match="unet/diffusion_pytorch_model.safetensors is missing"):
        open_model("tiny")


def test_a_copy_of_part_of_a_repository(tmp_path: Path) -> None:
    """The listing says what the repository has, the folder what was downloaded of it."""
    folder = lay(tmp_path, **PLAIN)
    there = {*list_files(folder), f"unet/{UNET}.fp16.safetensors"}
    parts = ["vae", "text_encoder"]
    weights = check_weights("it", folder, there, parts, "fp16", say=lambda line: None)
    assert weights["vae"] == f"vae/{UNET}.safetensors"
