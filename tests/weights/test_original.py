"""Original checkpoints: what diffusers' single-file loader makes of a file is what ours does."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdx.config.schema import HiddenAct, PredictionType
from sdx.models.module import flat
from sdx.weights.configs import check_model, read_model
from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS
from sdx.weights.load import load_text_encoder, load_unet, load_vae
from sdx.weights.model_files import ModelFiles, open_model
from sdx.weights.original import open_original, open_unet_file
from tests.weights.conftest import Reference
from tests.weights.original_layout import (
    original_model,
    original_unet,
)

with warnings.catch_warnings(action="ignore"):
    converters: Any = import_module("diffusers.loaders.single_file_utils")
    diffusers: Any = import_module("diffusers")
    transformers: Any = import_module("transformers")

INPAINTING = torch.zeros(320, 9, 3, 3)


def original_tensors(reference: Reference) -> dict[str, Any]:
    parts = (reference.unet, reference.vae, reference.text_encoder)
    return original_model(reference.kind, *(part.state_dict() for part in parts))


@pytest.fixture(scope="session")
def original(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference in one original file that says what it was trained for; never written to."""
    path = tmp_path_factory.mktemp("original") / f"{reference.kind}.safetensors"
    trained = {"sd1": "epsilon", "sd2": "v"}[reference.kind]
    save_file(original_tensors(reference), path, {"modelspec.prediction_type": trained})
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file of some tensors, with some metadata."""

    def write_file(tensors: dict[str, Any], **metadata: str) -> Path:
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, {f"modelspec.{key}": value for key, value in metadata.items()})
        return path

    return write_file


def small(*names: str) -> dict[str, Any]:
    return {name: torch.zeros(2) for name in names}


def config(files: ModelFiles, component: str) -> dict[str, Any]:
    found = files.config(component)
    assert found is not None
    return found


def test_every_tensor_is_diffusers(reference: Reference, original: Path) -> None:
    """diffusers' loader, the torch models the file was made from, and ours, to the last bit."""
    options = {"config": str(reference.folder), "local_files_only": True}
    with warnings.catch_warnings(action="ignore"):
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_single_file(
                str(original), subfolder="unet", **options
            ),
            "vae": diffusers.AutoencoderKL.from_single_file(
                str(original), subfolder="vae", **options
            ),
            "text_encoder": converters.create_diffusers_clip_model_from_ldm(
                transformers.CLIPTextModel,
                converters.load_single_file_checkpoint(str(original)),
                subfolder="text_encoder",
                **options,
            ),
        }
    files = open_original(str(original), original, reference.model)
    for part, module in theirs.items():
        wanted = module.state_dict()
        with files.tensors(part) as tensors:
            assert tensors.shapes() == {name: tuple(t.shape) for name, t in wanted.items()}
            for name, tensor in wanted.items():
                np.testing.assert_array_equal(tensors.read(name), tensor.numpy(), err_msg=name)
        source = getattr(reference, part).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in source.items())


def test_it_loads_as_the_folder_does(reference: Reference, original: Path) -> None:
    files, folder = (
        open_model(str(original), model=reference.model),
        open_model(str(reference.folder)),
    )
    check_model(files, reference.model, COMPONENTS)
    for load, part in ((load_unet, "unet"), (load_vae, "vae"), (load_text_encoder, "text_encoder")):
        abstract = getattr(reference.networks, part).abstract()
        ours, theirs = flat(load(files, abstract)), flat(load(folder, abstract))
        for path, value in theirs.items():
            np.testing.assert_array_equal(ours[path], value, err_msg="/".join(path))


def test_the_architecture_is_told(reference: Reference, original: Path) -> None:
    """Shapes decide against the given model; what they do not tell is the model's."""
    right = reference.model
    other = replace(
        right,
        prediction_type=PredictionType.sample,
        unet=replace(right.unet, cross_attention_dim=8, use_linear_projection=None, norm_eps=1e-3),
        vae=replace(right.vae, block_out_channels=[1, 2, 3], scaling_factor=0.5),
        text_encoder=replace(
            right.text_encoder, hidden_size=8, hidden_act=HiddenAct.gelu, num_hidden_layers=9
        ),
    )
    files = open_original(str(original), original, other)
    read = read_model(files)
    assert read.prediction_type is right.prediction_type
    assert read.unet == replace(right.unet, norm_eps=1e-3)
    assert read.vae == replace(right.vae, scaling_factor=0.5)
    assert read.text_encoder == right.text_encoder
    with pytest.raises(WeightsError) as error:
        check_model(files, other, COMPONENTS)
    trained = right.prediction_type.name
    assert f"model.prediction_type is sample, in {original.name} {trained}" in error.value.faults
    assert f"model.unet.cross_attention_dim is 8, in {original.name} 24" in error.value.faults
    assert (
        f"model.vae.block_out_channels is [1, 2, 3], in {original.name} [8, 16]"
        in error.value.faults
    )


def test_its_tokenizer_is_clips(reference: Reference, original: Path) -> None:
    folder = open_original(str(original), original, reference.model).tokenizer_folder()
    assert folder.name == reference.kind
    assert {"vocab.json", "merges.txt"} <= {path.name for path in folder.iterdir()}


def test_averaged_weights_are_left_with_a_word(
    write: Callable[..., Path], sd2: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = original_tensors(sd2)
    open_original("x", write(tensors, prediction_type="v"), sd2.model)
    assert capsys.readouterr().out == ""
    averages = {f"model_ema.{name}": torch.zeros(1) for name in ("decay", "diffusion_modelx")}
    path = write(tensors | averages | small("embedding_manager.x"), prediction_type="v")
    open_original("x", path, sd2.model)
    assert capsys.readouterr().out == (
        f"{path}: arrays that are not read: 1 of embedding_manager.*, 2 of model_ema.*; the plain "
        "weights are read, as diffusers does\n"
    )


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (small("conditioner.embedders.1.model.x"), "Stable Diffusion XL; sdx trains"),
        (small("model.diffusion_model.label_emb.0.0.bias"), "XL, an upscaler or unCLIP"),
        (small("model.diffusion_model.joint_blocks.0.x"), "Stable Diffusion 3 or Flux"),
        (small("control_model.x"), "a ControlNet"),
        (small("lora_unet_down.x"), "a LoRA adapter; give the model it was made for"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": INPAINTING},
            "inpainting model, by the 9",
        ),
        (small("model.diffusion_model.x"), r"first_stage_model\.\* and .*model\.unet_checkpoint"),
        (small("down_blocks.0.x"), "no model.diffusion_model.*model.unet_checkpoint"),
        (
            small("model.diffusion_model.x", "first_stage_model.x"),
            r"no cond_stage_model\.transformer\.\* in it; give the file it was cut from, or",
        ),
    ],
)
def test_other_files_are_told_what_they_are(
    write: Callable[..., Path], sd2: Reference, tensors: dict[str, Any], match: str
) -> None:
    with pytest.raises(WeightsError, match=match):
        open_original("x", write(tensors), sd2.model)


def test_files_that_cannot_be_read(tmp_path: Path, sd2: Reference) -> None:
    path = tmp_path / "v1-5-pruned.ckpt"
    path.write_bytes(b"\x80\x02}.")
    with pytest.raises(WeightsError, match="a pickle, which may run any code, is not opened"):
        open_model(str(path), model=sd2.model)
    path = path.rename(tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match="damaged or cut short"):
        open_model(str(path), model=sd2.model)
    with pytest.raises(WeightsError, match=r"gone\.safetensors: not there"):
        open_model(str(tmp_path / "gone.safetensors"), model=sd2.model)


@pytest.mark.parametrize("option", [{"revision": "main"}, {"variant": "fp16"}])
def test_what_a_single_file_has_not(original: Path, option: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="a single file has no model.revision"):
        open_model(str(original), **option)


def stability_like(width: int) -> dict[str, Any]:
    """The few arrays by which a published model is known."""
    text = {
        768: "cond_stage_model.transformer.text_model.x",
        1024: "cond_stage_model.model.ln_final.x",
    }
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return {key: torch.zeros(2, width)} | small("first_stage_model.x", text.get(width, text[1024]))


YAML = "model:\n  params:\n    parameterization: {}\n    linear_end: 0.02\n    scale_factor: 0.5\n"


@pytest.mark.parametrize(
    ("width", "metadata", "yaml", "name", "trained"),
    [
        (768, {}, None, "sd15", "epsilon"),
        (768, {"prediction_type": "v"}, None, "sd15", "v_prediction"),
        (1024, {"prediction_type": "v"}, None, "sd21", "v_prediction"),
        (1024, {"prediction_type": "epsilon"}, None, "sd21_base", "epsilon"),
        (1024, {}, YAML.format("v"), "sd21", "v_prediction"),
        (1024, {}, "model:\n  params:\n    linear_start: 0.00085\n", "sd21_base", "epsilon"),
    ],
)
def test_which_of_stabilitys_models_it_is(
    write: Callable[..., Path],
    width: int,
    metadata: dict[str, str],
    yaml: str | None,
    name: str,
    trained: str,
) -> None:
    path = write(stability_like(width), **metadata)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    files = open_original("x", path, None)
    scheduler, vae = config(files, "scheduler"), config(files, "vae")
    assert (files.model.name, scheduler["prediction_type"]) == (name, trained)
    is_other = yaml is not None and "0.02" in yaml
    assert scheduler["beta_end"] == (0.02 if is_other else 0.012)
    assert vae["scaling_factor"] == (0.5 if is_other else 0.18215)


@pytest.mark.parametrize(
    ("width", "metadata", "yaml", "match"),
    [
        (24, {}, None, "text states of width 24 are neither 1.x's"),
        (1024, {}, None, "nothing tells what its UNet outputs.*model=sd21 if.*model=sd21_base"),
        (1024, {}, "other: program", "nothing tells what its UNet outputs"),
        (1024, {"prediction_type": "flow"}, None, "prediction_type=flow: sdx knows epsilon, v"),
        (1024, {}, YAML.format("mu"), "parameterization=mu: sdx knows eps, v, x0"),
        (
            1024,
            {"prediction_type": "v"},
            YAML.format("eps"),
            "v_prediction by its metadata, for ep",
        ),
        (1024, {}, "{", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_known_is_refused(
    write: Callable[..., Path], width: int, metadata: dict[str, str], yaml: str | None, match: str
) -> None:
    path = write(stability_like(width), **metadata)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    with pytest.raises(WeightsError, match=match):
        open_original("x", path, None)


def test_a_named_model_says_what_nothing_tells(write: Callable[..., Path], sd2: Reference) -> None:
    files = open_original("x", write(stability_like(1024)), sd2.model)
    assert config(files, "scheduler")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
def test_a_unet_alone(reference: Reference, write: Callable[..., Path], spelling: str) -> None:
    state = reference.unet.state_dict()
    tensors = original_unet(state) if spelling == "original" else state
    files = open_unet_file("x", write(dict(tensors)), reference.model)
    with files.tensors("unet") as read:
        assert read.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, tensor in state.items():
            np.testing.assert_array_equal(read.read(name), tensor.numpy(), err_msg=name)
    assert files.config("scheduler") is None and files.config("vae") is None
    assert config(files, "unet")["cross_attention_dim"] == 24


def test_a_file_without_a_unet(write: Callable[..., Path], sd2: Reference) -> None:
    with pytest.raises(WeightsError, match="no UNet in it, neither"):
        open_unet_file("x", write(small("encoder.x")), sd2.model)
