"""`sdx.load`: where models come from, and the keywords that say which."""

import json
import shutil
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

import sdx
from sdx.config.errors import ConfigError
from sdx.config.leaves import plain
from sdx.config.schema import ModelConfig, SamplerKind
from sdx.models.module import flat
from sdx.pipeline import Pipeline
from sdx.weights.errors import WeightsError
from sdx.weights.folder import CONFIGS
from tests.weights.conftest import Reference, make_reference
from tests.weights.original_layout import original_model

CLIP = Path(sdx.__file__).parent / "assets" / "clip"
VOCABULARY = 49408


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """A whole folder with CLIP's vocabulary and the noise schedule of Stable Diffusion."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = make_reference(request.param, folder, vocab_size=VOCABULARY)
    (folder / "tokenizer").symlink_to(CLIP / request.param)
    with warnings.catch_warnings(action="ignore"):
        diffusers: Any = import_module("diffusers")
        trained = reference.model.prediction_type.name
        diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            set_alpha_to_one=False, steps_offset=1, clip_sample=False, prediction_type=trained,
        ).save_pretrained(folder / "scheduler")  # fmt: skip
    return reference


@pytest.fixture
def original(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reference in one original file that does not tell what it is, and a conf/ that knows."""
    parts = (reference.unet, reference.vae, reference.text_encoder)
    tensors = original_model(reference.kind, *(part.state_dict() for part in parts))
    save_file(tensors, tmp_path / "model.safetensors")
    options = tmp_path / "conf" / "model"
    options.mkdir(parents=True)
    right = reference.model
    wider = replace(right.text_encoder, hidden_size=32)
    wrong = replace(right, text_encoder=wider, unet=replace(right.unet, cross_attention_dim=32))
    for name, model in (("mine", right), ("wrong", wrong)):
        (options / f"{name}.yaml").write_text(as_option(model, name))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model.safetensors"


def as_option(model: ModelConfig, name: str) -> str:
    """`model` as the option `name` of conf/model."""
    parts = ("unet", "vae", "text_encoder")
    keys: dict[str, Any] = {key: plain(value) for key, value in vars(model).items()}
    keys |= {part: {k: plain(v) for k, v in vars(keys[part]).items()} for part in parts}
    rest = {"optimizer": {"lr": 1e-5}, "train": {"max_steps": 1, "per_device_batch_size": 1}}
    return "# @package _global_\n" + yaml.safe_dump({"model": keys | {"name": name}} | rest)


def assert_alike(one: Pipeline, other: Pipeline) -> None:
    assert one.diffusion == other.diffusion and one.latent_shape == other.latent_shape
    assert one.functions.rule.kind is other.functions.rule.kind is SamplerKind.ddim
    assert one.functions.rule.prediction_type is other.functions.rule.prediction_type
    texts = ["hi!! !", "a photo", ""]
    np.testing.assert_array_equal(one.tokenize(texts), other.tokenize(texts))
    for path, value in flat(other.params).items():
        np.testing.assert_array_equal(flat(one.params)[path], value, err_msg="/".join(path))


def test_an_original_file_is_its_folder(reference: Reference, original: Path) -> None:
    named, folder = sdx.load(original, model="mine"), sdx.load(reference.folder)
    assert_alike(named, folder)
    assert (named.model.unet, named.model.vae) == (folder.model.unet, folder.model.vae)
    assert named.model.text_encoder == folder.model.text_encoder


def test_a_name_that_is_wrong_or_not_needed(reference: Reference, original: Path) -> None:
    with pytest.raises(WeightsError, match="text states of width 24 .* model=NAME"):
        sdx.load(original)
    with pytest.raises(WeightsError) as error:
        sdx.load(original, model="wrong")
    assert error.value.faults == [
        f"model.unet.cross_attention_dim is 32, in {original.name} 24",
        f"model.text_encoder.hidden_size is 32, in {original.name} 24",
    ]
    with pytest.raises(ConfigError, match="model=sd3"):
        sdx.load(original, model="sd3")
    with pytest.raises(WeightsError, match="only an original .safetensors file needs it"):
        sdx.load(reference.folder, model="mine")


def test_revision_and_variant_are_handed_on(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def open_model(source: str, **options: Any) -> Any:
        asked.update(options, source=source)
        return reference.files

    monkeypatch.setattr("sdx.pipeline.open_model", open_model)
    assert sdx.load("owner/name", "v2", variant="fp16").model.unet == reference.model.unet
    assert asked == {"source": "owner/name", "revision": "v2", "variant": "fp16", "model": None}


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"attention_head_dim": [3, 4]}),
        ("unet", {"norm_num_groups": 5}),
        ("unet", {"sample_size": 0}),
        ("vae", {"norm_num_groups": 3}),
        ("vae", {"scaling_factor": 0}),
        ("text_encoder", {"num_attention_heads": 7}),
        ("scheduler", {"beta_start": 2.0}),
        ("scheduler", {"beta_start": True}),
        ("scheduler", {"num_train_timesteps": 1000.5}),
        ("scheduler", {"num_train_timesteps": -1}),
        ("scheduler", {"rescale_betas_zero_snr": "yes"}),
        ("scheduler", {"prediction_type": ["epsilon"]}),
        ("scheduler", {"_class_name": ["DDIMScheduler"]}),
    ],
)
def test_numbers_that_no_model_has_are_refused(
    reference: Reference, tmp_path: Path, part: str, changed: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(reference.folder, tmp_path / "model"))
    path = folder / part / CONFIGS[part]
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(WeightsError, match=next(iter(changed))):
        sdx.load(folder)
