"""model.from_files and what is told of files that disagree, as a start prepares."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

import sdx
from sdx.config.compose import compose
from sdx.config.errors import ConfigError
from sdx.config.identity import identity
from sdx.config.schema import Config, HiddenAct, PredictionType
from sdx.experiment.setup import prepare
from sdx.weights.errors import WeightsError
from sdx.weights.original import GUESSES
from tests.weights.conftest import Reference, make_reference
from tests.weights.original_layout import original_model

HERE = [
    "mesh=dp",
    "hardware.num_devices=8",
    "train.per_device_batch_size=null",
    "train.global_batch_size=8",
    "run.compilation_cache_dir=null",
    "sample.num_adherence_prompts=null",
]
CLIP = Path(sdx.__file__).parent / "assets" / "clip" / "sd1"
FROM_FILES = "model.from_files=true"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Nothing like model=tiny: 1.x's projections, activation and objective; plus a tokenizer."""
    reference = make_reference("sd1", tmp_path_factory.mktemp("sd1"), vocab_size=49408)
    (reference.folder / "tokenizer").symlink_to(CLIP)
    return reference


def configure(reference: Reference, *overrides: str) -> Config:
    return compose(
        [*HERE, f"model.pretrained={reference.folder}", "model.init=pretrained", *overrides]
    )


def test_files_that_disagree_are_refused_with_both_values(reference: Reference) -> None:
    with pytest.raises(WeightsError) as error:
        prepare(configure(reference))
    faults = error.value.faults
    assert (
        "model.prediction_type is v_prediction, in scheduler/scheduler_config.json epsilon"
        in faults
    )
    assert "model.vae.scaling_factor is 1.0, in vae/config.json 0.18215" in faults
    assert "model.unet.attention_head_dim is [1, 2], in unet/config.json [2, 2]" in faults
    assert "model.from_files=true" in str(error.value)


def test_adopting_is_typing_by_hand(
    reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that is printed is the overrides that would have done the same."""
    adopted = prepare(configure(reference, FROM_FILES)).config
    assert adopted.model.text_encoder.hidden_act is HiddenAct.quick_gelu
    assert adopted.model.prediction_type is PredictionType.epsilon
    assert adopted.model.resolution == 16 and not adopted.model.from_files
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "taken" in line]
    typed = prepare(configure(reference, *line.removeprefix("taken from the files: ").split()))
    assert identity(typed.config) == identity(adopted)
    assert typed.config.model == adopted.model
    assert typed.paths.root == prepare(configure(reference, FROM_FILES)).paths.root


def test_adopting_what_is_typed_already(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(compose([*HERE, FROM_FILES])).unet is None
    assert "taken from the files: what model=tiny says\n" in capsys.readouterr().out


def test_a_unet_from_random_stays_as_it_is(reference: Reference) -> None:
    random = ["model.init=random", "model.unet.cross_attention_dim=24", FROM_FILES]
    with pytest.raises(ConfigError, match="cross_attention_dim"):
        configure(reference, *random)
    text = "model.text_encoder.hidden_size=24"
    adopted = prepare(configure(reference, *random, text)).config
    assert adopted.model.unet.block_out_channels == [48, 64]
    assert (adopted.model.resolution, adopted.model.unet.sample_size) == (64, 32)  # a factor of 2
    assert adopted.model.text_encoder.num_attention_heads == 2
    assert adopted.model.prediction_type is PredictionType.v_prediction


def test_what_is_adopted_must_meet_the_rules(reference: Reference, tmp_path: Path) -> None:
    folder = shutil.copytree(reference.folder, tmp_path / "model", symlinks=True)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 32}))
    with pytest.raises(ConfigError, match="model.unet.cross_attention_dim=32: must equal"):
        prepare(configure(reference, f"model.pretrained={folder}", FROM_FILES))


def test_an_original_file_is_adopted_as_what_it_is(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shapes do not tell comes from the known model of that width, not from model=."""
    parts = (reference.unet, reference.vae, reference.text_encoder)
    path = tmp_path / "model.safetensors"
    save_file(original_model("sd1", *(part.state_dict() for part in parts)), path)
    overrides = [f"model.pretrained={path}", FROM_FILES, "model.unet.attention_head_dim=[4,4]"]
    with pytest.raises(WeightsError, match=r"width 24 are neither.*model.from_files=false"):
        prepare(configure(reference, *overrides))
    monkeypatch.setitem(GUESSES, 24, {None: "tiny"})
    setup = prepare(configure(reference, *overrides))
    assert setup.config.model.unet.attention_head_dim == [1, 2]
    assert setup.config.model.unet.cross_attention_dim == 24
    assert not setup.config.model.unet.use_linear_projection
    assert setup.tokenizer.pad_token_id == 49407
    alone = f"model.unet_checkpoint={path}"
    with pytest.raises(WeightsError, match="does not tell its attention heads"):
        prepare(configure(reference, FROM_FILES, alone))


def test_another_noise_schedule_is_told(
    reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers' defaults, which the reference's scheduler has, are not Stable Diffusion's."""
    prepare(configure(reference, FROM_FILES))
    where = reference.folder / "scheduler" / "scheduler_config.json"
    out = capsys.readouterr().out.splitlines()
    told = [line.partition(f" in {where}: ")[0] for line in out if str(where) in line]
    assert told == [
        "diffusion.beta_start is 0.00085, beta_start is 0.0001",
        "diffusion.beta_end is 0.012, beta_end is 0.02",
        "diffusion.beta_schedule is scaled_linear, beta_schedule is linear",
    ]
