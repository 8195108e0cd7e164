"""Composition: every file of conf/, precedence, users' own options, and saved configurations."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose

from sdx.config import compose as composition
from sdx.config.compose import compose, from_saved, to_yaml
from sdx.config.errors import ConfigError
from sdx.config.folders import CONF, default_options, group_options
from sdx.config.identity import identity
from sdx.config.resolve import with_global_batch
from sdx.config.schema import SCHEMA_VERSION, AttentionKind, Config, PredictionType, Sink

OPTIONS = [(group, name) for group, names in group_options([CONF]).items() for name in names]
# What an option needs from the person beside it.
NEEDS = {
    ("data", "imagefolder"): ["data.dir=photos"],
    ("data", "huggingface"): ["data.name=somebody/pictures"],
    ("data", "parquet"): ["data.dir=tables"],
    ("data", "webdataset"): ["data.dir=shards"],
    ("data", "arrayrecord"): ["data.dir=records"],
    ("data", "plugin"): ["data.plugin=mine"],
    ("experiment", "finetune_sd21"): ["data.dir=photos"],
    ("experiment", "mlperf_sd2"): ["data.dir=shards", "hardware=gpu_h100_8"],
    ("attention", "cudnn"): ["hardware=gpu_h100_8"],
    ("attention", "flash"): ["hardware=tpu_v4_8"],
    ("attention", "splash"): ["hardware=tpu_v4_8"],
    ("mesh", "dp"): ["hardware=gpu_h100_8"],
    ("mesh", "fsdp"): ["hardware=gpu_h100_8"],
    ("mesh", "fsdp_tensor"): ["hardware=gpu_h100_8"],
    ("xla", "gpu"): ["hardware=gpu_h100_8"],
    ("xla", "gpu_deterministic"): ["hardware=gpu_h100_8"],
    ("xla", "tpu"): ["hardware=tpu_v4_8"],
    ("xla", "tpu_multislice"): ["hardware=tpu_v4_32x2"],
    ("xla", "tpu_v5p"): ["hardware=tpu_v5p_8"],
}


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_converts_and_checks(group: str, name: str) -> None:
    config = compose([f"{group}={name}", *NEEDS.get((group, name), [])])
    assert type(config) is Config
    if group in ("model", "hardware"):
        assert getattr(config, group).name == name


def test_the_base_configuration_is_the_embedded_default() -> None:
    config = compose([])
    names = (config.model.name, config.data.kind.name, config.hardware.name)
    assert names == ("tiny", "shapes", "cpu")
    assert config.hardware.num_devices == 1
    assert config.sample.num_adherence_prompts == 200


def test_composed_values_are_plain_and_typed() -> None:
    config = compose(["sample.prompts=['a, b',c]", "train.per_device_batch_size=4"])
    assert type(config.sample.prompts) is list and config.sample.prompts == ["a, b", "c"]
    assert type(config.train.per_device_batch_size) is float
    assert config.model.prediction_type in PredictionType
    assert config.metrics.sinks == [Sink.tensorboard, Sink.jsonl]


def test_hardware_sets_the_mesh_an_experiment_wins_and_the_command_line_wins_over_both(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "experiment" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(
        "# @package _global_\n"
        "defaults:\n  - override /mesh: dp\n  - override /attention: dot_product\n"
        "hardware:\n  hbm_gib: 20.0\n"
        "optimizer:\n  lr: 3e-6\n"
    )
    tpu = "hardware=tpu_v4_32"
    plain = compose([tpu])
    assert (plain.mesh.ici.data, plain.mesh.ici.fsdp) == (1, -1)
    assert (plain.attention.kind, plain.hardware.hbm_gib) == (AttentionKind.auto, 30.75)
    mine = compose([tpu, "experiment=mine"], config_dir=tmp_path)
    assert (mine.mesh.ici.data, mine.mesh.ici.fsdp) == (-1, 1)
    assert (mine.attention.kind, mine.hardware.hbm_gib) == (AttentionKind.dot_product, 20.0)
    assert mine.optimizer.lr == 3e-6
    typed = ["experiment=mine", "mesh=fsdp", "attention=auto", "hardware.hbm_gib=7"]
    typed = compose([*typed, "optimizer.lr=1e-7", tpu], config_dir=tmp_path)
    assert (typed.mesh.ici.data, typed.mesh.ici.fsdp) == (1, -1)
    assert (typed.attention.kind, typed.hardware.hbm_gib) == (AttentionKind.auto, 7.0)
    assert typed.optimizer.lr == 1e-7


def test_debug_wins_over_an_experiment() -> None:
    config = compose(["experiment=finetune_sd21", "data.dir=photos", "debug=fast"])
    assert (config.model.name, config.checkpoint.every) == ("sd21", 2)


def test_the_model_brings_its_training_numbers() -> None:
    config = compose(["model=sd21"])
    assert (config.optimizer.lr, config.train.max_steps) == (1e-5, 15000)


def test_options_are_found_in_conf_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = tmp_path / "conf" / "optimizer" / "gentle.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("kind: adamw\nlr: 1e-9\n")
    monkeypatch.chdir(tmp_path)
    assert compose(["optimizer=gentle"]).optimizer.lr == 1e-9


def test_a_file_that_would_never_be_read_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "model" / "tiny.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\n")
    with pytest.raises(ConfigError, match="an option of that name.*rename the file"):
        compose([], config_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lrr: 1e-5", "optimizer.lrr: unknown key"),
        ("lr: fast", "optimizer.lr: "),
        ("kind: ???", "optimizer.kind: missing; set it in conf/ or pass optimizer.kind=…"),
        ("lr: ${nothing.there}", "optimizer.lr: Interpolation key 'nothing.there' not found"),
        ("defaults:\n  - base_adam", "base_adam"),
        ("lr: [", "conf"),
    ],
)
def test_faults_in_a_users_file_are_reported(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "optimizer" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"{text}\n")
    with pytest.raises(ConfigError) as caught:
        compose(["optimizer=mine"], config_dir=tmp_path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "overrides", [[], ["experiment=finetune_sd21", "data.dir=photos", "hardware=tpu_v4_32"]]
)
def test_a_saved_configuration_comes_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = compose([*overrides, "sample.prompts=[\"it's: x\",'']", "run.name='0123'"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_saved(tmp_path) == config
    assert from_saved(tmp_path / "config.yaml") == config


def test_overrides_go_on_top_of_a_saved_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose([])))
    config = from_saved(tmp_path, ["optimizer.lr=1e-7", "train={max_steps:3}"])
    assert (config.optimizer.lr, config.train.max_steps) == (1e-7, 3)


def test_a_saved_run_moves_to_other_hardware_with_its_batch(tmp_path: Path) -> None:
    saved = with_global_batch(compose(["optimizer.lr=1e-7", "train.per_device_batch_size=32"]))
    (tmp_path / "config.yaml").write_text(to_yaml(saved))
    moved = from_saved(tmp_path, ["hardware=tpu_v4_32", "mesh.ici.tensor=2"])
    there = compose(["hardware=tpu_v4_32", "mesh.ici.tensor=2"])
    assert (moved.hardware, moved.mesh) == (there.hardware, there.mesh)
    assert (moved.train, moved.optimizer) == (saved.train, saved.optimizer)
    assert identity(moved) == identity(saved)
    assert from_saved(tmp_path, ["mesh=fsdp"]).hardware == saved.hardware
    with pytest.raises(ConfigError, match="must be a multiple of mesh data x fsdp = 64"):
        from_saved(tmp_path, ["hardware=gpu_h100_8x8"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr"),
        ("optimizer.lr=abc", "must be a number"),
        ("optimizer.b1=1", "must be at least 0 and below 1"),
        (
            "model=sd21",
            r"model=sd21: a saved configuration has made this choice; set its keys \(model.…\);"
            " hardware, mesh, attention or xla may be chosen anew.",
        ),
        ("experiment=finetune_sd21", "a saved configuration has made this choice"),
        ("hydra.verbose=true", "hydra: unknown key"),
    ],
)
def test_bad_overrides_of_a_saved_configuration(
    tmp_path: Path, override: str, expected: str
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose([])))
    with pytest.raises(ConfigError, match=expected):
        from_saved(tmp_path, [override])


def test_a_saved_file_may_lack_keys_added_since_but_not_hold_unknown_ones(tmp_path: Path) -> None:
    saved = yaml.safe_load(to_yaml(compose([])))
    del saved["metrics"]
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(saved))
    assert from_saved(tmp_path / "older.yaml") == compose([])
    saved["train"]["max_stps"] = 3
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match="train.max_stps: unknown key in odd.yaml"):
        from_saved(tmp_path / "odd.yaml")


def test_a_saved_file_of_another_sdx_is_refused(tmp_path: Path) -> None:
    saved = yaml.safe_load(to_yaml(compose([])))
    newer = saved | {"schema_version": SCHEMA_VERSION + 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(newer))
    with pytest.raises(ConfigError, match="is not known to this sdx, which writes 1; use the sdx"):
        from_saved(tmp_path)


def test_a_saved_file_of_an_older_sdx_is_migrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(saved: dict[str, Any]) -> dict[str, Any]:
        return saved | {"train": {"max_steps": saved["train"]["steps"]}}

    older = {"schema_version": SCHEMA_VERSION - 1, "train": {"steps": 77}}
    saved = yaml.safe_load(to_yaml(compose([]))) | older
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    monkeypatch.setattr(composition, "MIGRATIONS", {SCHEMA_VERSION - 1: rename})
    config = from_saved(tmp_path, ["train.per_device_batch_size=1"])
    assert (config.train.max_steps, config.schema_version) == (77, SCHEMA_VERSION)


@pytest.mark.parametrize("content", ["[1, 2]", "hello", "a: [", "schema_version: x"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError):
        from_saved(tmp_path)


def test_the_same_file_in_conf_of_the_current_folder_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "mesh" / "single.yaml"
    file.parent.mkdir()
    file.write_bytes((CONF / "mesh" / "single.yaml").read_bytes())
    compose([], config_dir=tmp_path)


def test_hydra_writes_nothing_wherever_a_launcher_runs_it() -> None:
    with composition.composing([CONF]):
        hydra = hydra_compose(config_name="config", return_hydra_config=True).hydra
    assert hydra.output_subdir is None and hydra.job.chdir is False and hydra.run.dir == "."
    assert hydra.job_logging.root is None and hydra.hydra_logging.root is None


def test_every_group_but_the_presets_has_a_default() -> None:
    assert set(group_options([CONF])) - set(default_options()) == {"experiment", "sweep", "debug"}


def test_a_mapping_takes_keys_from_the_command_line_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "# @package _global_\ndata:\n  kind: plugin\n  plugin: mine\n"
        "  options: {folder: pictures, size: {least: 1}}\n"
    )
    typed = ["data.options={folder: x, names: [a, b]}", "+data.options.size.most=2"]
    config = compose(["data=mine", *typed], config_dir=tmp_path)
    expected = {"folder": "x", "names": ["a", "b"], "size": {"least": 1, "most": 2}}
    assert config.data.options == expected
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = from_saved(tmp_path / "config.yaml", ["data.options.size.least=3"])
    assert again.data.options == expected | {"size": {"least": 3, "most": 2}}


def test_a_group_without_an_option_is_null_again() -> None:
    plain = compose([])
    assert compose(["debug=null", "experiment=null"]) == plain
    assert compose(["debug=overfit", "debug=null"]) == plain != compose(["debug=overfit"])
