"""The jobs of a sweep: values multiplied out, tied together or named; and what is refused."""

from pathlib import Path

import pytest

from sdx.config.arguments import parse_arguments
from sdx.config.errors import ConfigError
from sdx.config.expansion import expand
from sdx.config.schema import Config
from sdx.config.sweeping import SweepRequest, SweptJob, read_request

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that each test is in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(*argv: str) -> Config | SweepRequest:
    return read_request("train", parse_arguments(argv))


def swept(*argv: str) -> list[SweptJob]:
    request = asked(*argv)
    assert isinstance(request, SweepRequest)
    return request.jobs


def faults(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        asked(*argv)
    return [str(problem) for problem in refused.value.problems]


def own_option(folder: Path, group: str, name: str, text: str) -> None:
    file = folder / "conf" / group / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n{text}")


def test_every_combination_in_the_order_typed() -> None:
    assert expand({}, ["a=1,2", "b=3", "c=x,y"], []) == (
        [
            ["a=1", "b=3", "c=x"],
            ["a=1", "b=3", "c=y"],
            ["a=2", "b=3", "c=x"],
            ["a=2", "b=3", "c=y"],
        ],
        [],
    )


def test_the_last_values_of_a_key_count_and_a_name_gives_way_to_the_command_line() -> None:
    assert expand({"a": "1,2,3", "b": "0"}, ["a=7,8"], []) == ([["b=0", "a=7"], ["b=0", "a=8"]], [])
    assert expand({}, ["a=1,2", "a=5"], []) == ([["a=5"]], [])


def test_hydras_grammar_of_values_is_all_there() -> None:
    batches, _ = expand({}, ["a=range(0,3)", "b=choice(x,y)"], [])
    assert [batch[0] for batch in batches[::2]] == ["a=0", "a=1", "a=2"]
    quoted, _ = expand({}, ["c='a, b'", "d=[1,2]", "e={x:1}"], [])
    assert quoted == [["c='a, b'", "d=[1,2]", "e={x:1}"]]


def test_a_pattern_stands_for_the_options_that_fit() -> None:
    batches, _ = expand({}, ["sampler=glob(dd*)"], [])
    assert batches == [["sampler=ddim"], ["sampler=ddpm"]]
    _, [problem] = expand({}, ["sampler=glob(ee*)"], [])
    assert "no option has such a name" in str(problem) and "euler" in str(problem)
    batches, _ = expand({}, ["sampler=glob([dd*,eu*],exclude=ddpm)"], [])
    assert batches == [["sampler=ddim"], ["sampler=euler"]]


def test_tied_keys_change_together() -> None:
    batches, _ = expand({}, ["a=1,2", "b=x,y", "c=3,4"], ["a+c"])
    assert batches == [["a=1", "c=3", *b] for b in (["b=x"], ["b=y"])] + [
        ["a=2", "c=4", *b] for b in (["b=x"], ["b=y"])
    ]


@pytest.mark.parametrize(
    ("zipped", "expected"),
    [
        (["a+b"], "keys that change together need as many values: a has 2 and b has 3"),
        (["a+d"], "d is not swept; give it values: d=…,…"),
        (["alpha+b"], "alpha is not swept"),
        (["a"], "ties at least two keys; write hydra.sweeper.zip=[KEY+KEY]"),
        (["a+c", "c+a"], "a key can be tied once"),
    ],
)
def test_what_cannot_be_tied(zipped: list[str], expected: str) -> None:
    _, [problem] = expand({}, ["a=1,2", "b=1,2,3", "c=4,5"], zipped)
    assert problem.path == "hydra.sweeper.zip" and expected in str(problem)


def test_the_issue_s_zip_on_the_command_line() -> None:
    jobs = swept(
        "-m",
        "optimizer.lr=1e-5,2e-5",
        "train.per_device_batch_size=2,4",
        "hydra.sweeper.zip=[optimizer.lr+train.per_device_batch_size]",
    )
    found = [(job.config.optimizer.lr, job.config.train.per_device_batch_size) for job in jobs]
    assert found == [(1e-5, 2), (2e-5, 4)]


def test_a_named_sweep_is_one_without_a_switch_and_its_values_can_be_replaced() -> None:
    named = swept("sweep=lr")
    assert len(named) == 5 and len({job.config.optimizer.lr for job in named}) == 5
    other = swept("sweep=lr", "optimizer.lr=1e-7,1e-8", "run.seed=3")
    found = [(job.config.optimizer.lr, job.config.run.seed) for job in other]
    assert found == [(1e-7, 3), (1e-8, 3)]
    assert len(swept("sweep=lr", "run.seed=0,1")) == 10


def test_a_person_s_own_named_sweep_with_tied_keys(empty_folder: Path) -> None:
    text = (
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n"
        "    params: {optimizer.lr: '1e-5,2e-5', optimizer.b1: '0.8,0.9'}\n"
        "    zip: [optimizer.lr+optimizer.b1]\n"
    )
    own_option(empty_folder, "sweep", "mine", text)
    found = [(job.config.optimizer.lr, job.config.optimizer.b1) for job in swept("sweep=mine")]
    assert found == [(1e-5, 0.8), (2e-5, 0.9)]


def test_a_place_implies_a_sweep_of_one_and_brings_its_hardware() -> None:
    [job] = swept("run_on=slurm_a100", "hydra.launcher.partition=gpu")
    assert job.config.hardware.name == "gpu_a100_8"
    assert job.overrides == ["run_on=slurm_a100"]
    assert isinstance(asked("run_on=local"), Config)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-m", "run_on=local,slurm"], ["run_on=local,slurm: is one for all jobs of a sweep"]),
        (["-m", "sweep=lr,seeds"], ["sweep=lr,seeds: is one for all jobs of a sweep"]),
        (
            ["-m", "hydra.launcher.pin=true,false", "hydra/sweeper=sdx,basic"],
            ["hydra.launcher.pin=true,false: is one for all", "hydra/sweeper=sdx,basic: is one"],
        ),
        (["-m", "hydra.sweeper.dri_run=1"], ["unknown key; did you mean hydra.sweeper.dry_run?"]),
        (
            ["-m", "hydra.sweeper.max_parallel=0", "hydra.sweeper.dry_run=maybe"],
            ["hydra.sweeper.max_parallel=0: must be at least 1", "dry_run=maybe: must be true or"],
        ),
        (["-m", "hydra.sweeper.zip=a+b"], ["a list of texts; write hydra.sweeper.zip=[a+b]."]),
        (
            ["-m", "hydra.sweeper.n_trials=3"],
            ["hydra.sweeper.n_trials=3: a key of hydra/sweeper=sdx_search, here it is sdx"],
        ),
        (
            ["-m", "hydra.launcher.partition=gpu"],
            ["a key of hydra/launcher=sdx_slurm, here it is sdx_local; choose another run_on"],
        ),
        (["run_on=slurm", "hydra.launcher.nodse=2"], ["did you mean hydra.launcher.nodes?"]),
        (["run_on=slurm", "hydra.launcher.nodes=two"], ["nodes=two: must be a whole number"]),
        (["-m", "hydra/launcher=slurm"], ["not a launcher of sdx; did you mean sdx_slurm?"]),
        (["-m", "hydra/launcher=basic"], ["hydra/launcher=basic: not a launcher of sdx"]),
        (["-m", "hydra/sweeper=sdxx"], ["hydra/sweeper=sdxx: not a sweeper; did you mean sdx?"]),
        (["hydra/launcher=sdx_slurm"], ["has no effect without --multirun; add --multirun"]),
        (["hydra.sweeper.dry_run=true"], ["has no effect without --multirun; add --multirun"]),
        (["-m", "run.seed=0,0"], ["run.seed=0: two jobs of the sweep are the same run"]),
        (["-m", "optimizer.lr=interval(0,1)"], ["search: hydra/sweeper=sdx_search"]),
        (["-m", "optimizer.lr=1e-5,x", "modle=3"], ["modle=3: unknown", "optimizer.lr=x: must be"]),
        (["-m", "hydra.sweeper.params.run.seed=1"], ["for files in conf/sweep; type run.seed=1"]),
        (["-m", "sweep=lrr"], ["sweep=lrr: no such option; did you mean sweep=lr?"]),
    ],
)
def test_refused(argv: list[str], expected: list[str]) -> None:
    found = faults(*argv)
    assert len(found) == len(expected), found
    assert all(part in text for part, text in zip(expected, found, strict=True)), found


@pytest.mark.parametrize(
    ("argv", "is_refused"),
    [
        (["run_on=slurm_a100", "hardware=gpu_h100_8"], True),
        (["run_on=slurm_a100", "hardware=tpu_v4_32"], True),
        (["run_on=tpu_v4_32", "hardware=gpu_a100_8"], True),
        (["-m", "run_on=slurm_h100", "hardware=gpu_h100_8,gpu_h100_8x8"], False),
        (["run_on=slurm", "hardware=gpu_h100_8"], False),
        (["run_on=slurm", "hardware=cpu"], False),
    ],
)
def test_a_place_and_hardware_that_it_does_not_have(argv: list[str], is_refused: bool) -> None:
    if is_refused:
        [fault] = faults(*argv)
        assert fault.startswith("hardware=") and "leave it out, or another run_on" in fault
    else:
        swept(*argv)


def test_an_option_that_is_swept_over_cannot_set_the_place(empty_folder: Path) -> None:
    """Hydra takes the launcher of the first, and says nothing."""
    text = "defaults: [override /hydra/launcher: sdx_slurm]\n"
    own_option(empty_folder, "experiment", "there", text)
    [fault] = faults("-m", "experiment=there,shapes_epsilon")
    assert fault.startswith("hydra.launcher: an option that is swept over sets it")


def test_faults_of_a_launcher_s_file_name_the_key(empty_folder: Path) -> None:
    text = "defaults: [override /hydra/launcher: sdx_slurm]\nhydra: {launcher: {partitoin: gpu}}\n"
    own_option(empty_folder, "run_on", "ours", text)
    [fault] = faults("-m", "run_on=ours")
    assert fault == "hydra.launcher.partitoin: unknown key; did you mean hydra.launcher.partition?"
