"""Configs beside weights: read as the libraries read them, and compared with a run's."""

import inspect
import json
import shutil
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sdx.config.schema import DownBlock, HiddenAct, PredictionType
from sdx.weights.configs import (
    ABSENT,
    ONLY,
    check_model,
    read_model,
    read_text_encoder_config,
    read_unet_config,
    read_vae_config,
)
from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS
from sdx.weights.model_files import open_model


@pytest.fixture
def folder(sd2: Any, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(sd2.folder, tmp_path / "model"))


def edit(path: Path, *absent: str, **changes: Any) -> None:
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: found[key] for key in found if key not in absent}))


def test_what_torch_wrote_is_read(reference: Any) -> None:
    unet = read_unet_config(reference.files)
    assert unet.down_block_types == [DownBlock.CrossAttnDownBlock2D, DownBlock.DownBlock2D]
    assert unet.attention_head_dim == ([2, 2] if reference.kind == "sd1" else [2, 4])
    assert unet.use_linear_projection == (reference.kind == "sd2")
    assert unet.upcast_attention == (reference.kind == "sd2")
    assert read_vae_config(reference.files).scaling_factor == 0.18215
    act = HiddenAct.quick_gelu if reference.kind == "sd1" else HiddenAct.gelu
    assert read_text_encoder_config(reference.files).hidden_act is act


def test_absent_keys_mean_what_the_libraries_mean() -> None:
    with warnings.catch_warnings(action="ignore"):
        diffusers: Any = import_module("diffusers")
        transformers: Any = import_module("transformers")
        classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
        defaults = {
            part: {
                name: parameter.default
                for name, parameter in inspect.signature(kind.__init__).parameters.items()
            }
            for part, kind in classes.items()
        }
        defaults["text_encoder"] = transformers.CLIPTextConfig().to_dict()
    for part, keys in ABSENT.items():
        for key, value in keys.items():
            if (part, key) == ("unet", "sample_size"):  # None there: it is only a recommendation
                continue
            theirs = defaults[part][key]
            assert value == (list(theirs) if isinstance(theirs, tuple) else theirs), key
    for part, keys in ONLY.items():
        for key, allowed in keys.items():
            if key != "_class_name":  # the name of the class itself
                theirs = defaults[part][key]
                assert (theirs[0] if isinstance(theirs, tuple) else theirs) in allowed, key


def test_a_vae_without_its_scaling_factor(folder: Path) -> None:
    edit(folder / "vae/config.json", "scaling_factor")
    assert read_vae_config(open_model(str(folder))).scaling_factor == 0.18215


def test_another_network_is_refused(folder: Path) -> None:
    edit(folder / "unet/config.json", class_embed_type="timestep", time_cond_proj_dim=8)
    with pytest.raises(WeightsError) as error:
        read_unet_config(open_model(str(folder)))
    assert error.value.faults == [
        "class_embed_type=timestep: sdx computes only None",
        "time_cond_proj_dim=8: sdx computes only None",
    ]


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("unet", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "AttnDownBlock2D"),
        ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "does not mirror"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act=relu"),
    ],
)
def test_unknown_parts(folder: Path, file: str, changes: dict[str, Any], match: str) -> None:
    edit(folder / file / "config.json", **changes)
    read = read_unet_config if file == "unet" else read_text_encoder_config
    with pytest.raises(WeightsError, match=match):
        read(open_model(str(folder)))


@pytest.mark.parametrize(
    ("component", "changes", "hint"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "a UNet of Stable Diffusion XL"),
        ("unet", {"num_class_embeds": 1000}, "of an upscaler or of unCLIP"),
        ("unet", {"time_cond_proj_dim": 256}, "a latent consistency model"),
        ("unet", {"in_channels": 9}, "in_channels=9: an inpainting model"),
        ("unet", {"in_channels": 5}, "a depth-to-image model"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "_class_name=UNet3DConditionModel"),
        ("vae", {"_class_name": "AsymmetricAutoencoderKL"}, "only AutoencoderKL"),
        ("vae", {"shift_factor": 0.06, "latent_channels": 16}, "Stable Diffusion 3 or Flux"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "only DownEncoderBlock2D"),
        ("text_encoder", {"model_type": "clip"}, "save its text model alone"),
        ("text_encoder", {"model_type": "roberta_series"}, "only clip_text_model"),
    ],
)
def test_networks_of_other_models(
    folder: Path, component: str, changes: dict[str, Any], hint: str
) -> None:
    edit(folder / component / "config.json", **changes)
    with pytest.raises(WeightsError, match=hint):
        read_model(open_model(str(folder)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"block_out_channels": "16, 32"}, r"block_out_channels='16, 32': must look like \[320"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\]: must look like 2"),
        ({"use_linear_projection": None}, "use_linear_projection=None: must look like False"),
        ({"cross_attention_dim": True}, "cross_attention_dim=True: must look like 1280"),
        ({"attention_head_dim": [2, 4, 8]}, "must have 2 entries, as block_out_channels"),
        ({"down_block_types": ["DownBlock2D"]}, "must have 2 entries, as block_out_channels"),
        ({"in_channels": 16}, r"unet\.in_channels=16 in .*vae\.latent_channels=4"),
        ({"cross_attention_dim": 64}, r"unet\.cross_attention_dim=64 in .*hidden_size=24"),
    ],
)
def test_values_that_make_no_sense(folder: Path, changes: dict[str, Any], fault: str) -> None:
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(WeightsError, match=fault):
        read_model(open_model(str(folder)))


def test_lists_that_say_the_same_for_all_levels(folder: Path, sd2: Any) -> None:
    edit(
        folder / "unet" / "config.json",
        layers_per_block=[1, 1],
        cross_attention_dim=[24, 24],
        transformer_layers_per_block=[1, 1],
        only_cross_attention=[False, False],
        sample_size=None,
    )
    wanted = replace(read_model(sd2.files).unet, sample_size=64)
    assert read_unet_config(open_model(str(folder))) == wanted


def test_a_folder_that_fits(sd2: Any) -> None:
    check_model(sd2.files, sd2.model, COMPONENTS)


def test_every_difference_is_told(sd2: Any) -> None:
    model = sd2.model
    model = replace(
        model,
        prediction_type=PredictionType.epsilon,
        unet=replace(model.unet, attention_head_dim=[4, 4], sample_size=99),
        vae=replace(model.vae, scaling_factor=1.0),
        text_encoder=replace(model.text_encoder, hidden_act=HiddenAct.quick_gelu),
    )
    with pytest.raises(WeightsError) as error:
        check_model(sd2.files, model, COMPONENTS)
    assert sorted(error.value.faults) == [
        "model.prediction_type is epsilon, in scheduler/scheduler_config.json v_prediction",
        "model.text_encoder.hidden_act is quick_gelu, in text_encoder/config.json gelu",
        "model.unet.attention_head_dim is [4, 4], in unet/config.json [2, 4]",
        "model.vae.scaling_factor is 1.0, in vae/config.json 0.18215",
    ]


def test_random_start_needs_no_unet(folder: Path, sd2: Any) -> None:
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")
    files = open_model(str(folder), components=["vae", "text_encoder"])
    check_model(files, sd2.model, ["vae", "text_encoder"])
    with pytest.raises(WeightsError, match="unet/ is missing"):
        open_model(str(folder))


def test_a_missing_scheduler(folder: Path, sd2: Any) -> None:
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(WeightsError, match="nobody knows what the UNet was trained to output"):
        check_model(open_model(str(folder)), sd2.model, COMPONENTS)
