"""model.unet_checkpoint: every form it may have gives the same UNet, and the run starts from it."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdx.config.compose import compose, to_yaml
from sdx.config.schema import Config, PredictionType
from sdx.experiment.unet_checkpoint import open_unet_checkpoint
from sdx.models.attention import dot_product_attention
from sdx.models.module import Params, flat
from sdx.models.networks import make_networks
from sdx.record.paths import RunPaths
from sdx.training.checkpoint import Checkpointer, restore_params
from sdx.weights.configs import check_model
from sdx.weights.errors import WeightsError
from sdx.weights.load import load_unet
from sdx.weights.names import array_to_torch, to_torch
from tests.experiment.conftest import MICRO, Command
from tests.micro import micro_config
from tests.weights.conftest import Reference, make_reference

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference("sd2", tmp_path_factory.mktemp("sd2"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """As much of a training state as a checkpoint of weights needs."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any


def values(config: Config, seed: int) -> Params:
    networks = make_networks(config.model, attention=dot_product_attention, dtype="float32")
    return networks.unet.init(jax.random.key(seed))


def save_run(folder: Path, config: Config) -> Path:
    """A run of one checkpoint: parameters of seed 0, averages of seed 1."""
    paths = RunPaths(folder)
    folder.mkdir(exist_ok=True)
    paths.config.write_text(to_yaml(config))
    average = {"unet": values(config, 1)} if config.train.ema else None
    state = State(np.int32(7), {"unet": values(config, 0)}, average, ())
    checkpointer = Checkpointer(paths.checkpoints, keep=2, say=print)
    checkpointer.save(7, state)
    checkpointer.close()
    return folder


def assert_equal(ours: Params, theirs: Params) -> None:
    assert flat(ours).keys() == flat(theirs).keys()
    for path, value in flat(theirs).items():
        np.testing.assert_array_equal(flat(ours)[path], value, err_msg="/".join(path))


@pytest.mark.parametrize("form", ["model", "unet", "renamed", "file", "file in a folder"])
def test_every_form_of_files(reference: Reference, tmp_path: Path, form: str) -> None:
    unet = reference.folder / "unet"
    renamed = Path(shutil.copytree(unet, tmp_path / "unet_ema"))
    forms = {
        "model": reference.folder,
        "unet": unet,
        "renamed": renamed,
        "file": unet / WEIGHTS,
        "file in a folder": Path(shutil.copy(unet / WEIGHTS, tmp_path / "x.safetensors")),
    }
    files = open_unet_checkpoint(str(forms[form]), reference.model)
    check_model(files, reference.model, ["unet"])
    abstract = reference.networks.unet.abstract()
    assert_equal(load_unet(files, abstract), load_unet(reference.files, abstract))
    tells = files.config("scheduler") is not None
    assert tells == (form in ("model", "unet"))


def test_what_files_tell_must_agree(reference: Reference) -> None:
    model = reference.model
    other = replace(
        model,
        prediction_type=PredictionType.epsilon,
        unet=replace(model.unet, layers_per_block=2, upcast_attention=False),
    )
    with pytest.raises(WeightsError) as error:
        check_model(open_unet_checkpoint(str(reference.folder), other), other, ["unet"])
    assert error.value.faults == [
        "model.unet.layers_per_block is 2, in unet/config.json 1",
        "model.unet.upcast_attention is False, in unet/config.json True",
        "model.prediction_type is epsilon, in scheduler/scheduler_config.json v_prediction",
    ]
    alone = str(reference.folder / "unet" / WEIGHTS)
    with pytest.raises(WeightsError) as error:
        check_model(open_unet_checkpoint(alone, other), other, ["unet"])
    assert error.value.faults == [f"model.unet.layers_per_block is 2, in {WEIGHTS} 1"]


def test_no_unet(reference: Reference, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no UNet there; give its folder") as error:
        open_unet_checkpoint(str(tmp_path), reference.model)
    assert error.value.faults == ["unet/ is missing"]
    half = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(reference.folder / "unet" / WEIGHTS, half)
    with pytest.raises(WeightsError) as error:
        open_unet_checkpoint(str(tmp_path), reference.model)
    assert error.value.faults == [
        "unet/config.json is missing",
        f"unet/{WEIGHTS} is missing; found only model.variant=fp16",
    ]
    with pytest.raises(WeightsError, match="gone.safetensors: not there"):
        open_unet_checkpoint(str(tmp_path / "gone.safetensors"), reference.model)


@pytest.mark.parametrize("seed", [0, 1], ids=["raw", "averaged"])
def test_a_run_gives_its_averages_where_it_keeps_them(tmp_path: Path, seed: int) -> None:
    config = micro_config(ema=seed == 1)
    files = open_unet_checkpoint(str(save_run(tmp_path / "run", config)), config.model)
    check_model(files, config.model, ["unet"])
    wanted = values(config, seed)
    assert_equal(load_unet(files, wanted), wanted)


def test_a_run_that_trained_more_than_its_unet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = micro_config(text_encoder=True)
    run = save_run(tmp_path / "run", config)
    open_unet_checkpoint(str(run), config.model)
    assert capsys.readouterr().out == (
        f"{run}: trained its text encoder too, which is not read; run.resume_from keeps it\n"
    )


def test_a_run_must_agree(tmp_path: Path) -> None:
    config = micro_config()
    learnt = replace(config.diffusion, prediction_type=PredictionType.epsilon)
    run = save_run(tmp_path / "run", replace(config, diffusion=learnt))
    other = replace(config.model, unet=replace(config.model.unet, cross_attention_dim=16))
    with pytest.raises(WeightsError) as error:
        check_model(open_unet_checkpoint(str(run), other), other, ["unet"])
    assert error.value.faults == [
        "model.unet.cross_attention_dim is 16, in config.yaml 8",
        "model.prediction_type is v_prediction, in config.yaml epsilon",
    ]
    shutil.rmtree(RunPaths(run).checkpoints)
    with pytest.raises(WeightsError, match="this run has no checkpoint; give one that has"):
        open_unet_checkpoint(str(run), other)


def test_training_starts_from_it(command: Command, tmp_path: Path) -> None:
    """With a rate that changes nothing, the first checkpoint holds what the file did."""
    config = compose(MICRO)
    start = jax.tree.map(lambda x: x + 0.25, values(config, 5))  # no zeros, which 1e-30 moves
    tensors = {
        to_torch(path): np.ascontiguousarray(array_to_torch(path, np.asarray(value)))
        for path, value in flat(start).items()
    }
    save_file(tensors, tmp_path / "mine.safetensors")
    code, output = command.run(
        "model.init=pretrained",
        f"model.unet_checkpoint={tmp_path / 'mine.safetensors'}",
        "train.max_steps=1",
        "optimizer.lr=1e-30",
        "run.name=mine",
        "sample.every=null",
        "export.at_end=false",
        "metrics.sinks=[jsonl]",
    )
    assert code == 0, output
    _, saved = restore_params(command.path("mine", "checkpoints"), "params", say=print)
    assert_equal(saved["unet"], start)
