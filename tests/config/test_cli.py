"""From a command line to a body: switches, saved configurations, sweeps, exit codes, speed."""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sdx.config.arguments import parse_arguments
from sdx.config.cli import exit_code, run
from sdx.config.compose import compose, from_saved, to_yaml
from sdx.config.folders import CONF, group_options
from sdx.config.identity import identity, run_folder_name
from sdx.config.schema import Config
from sdx.config.sweeping import SweepRequest, SweptJob, read_request

pytestmark = pytest.mark.fast

SCRIPT = """
import sys
from sdx.config.cli import run
code = run("train", sys.argv[1:], lambda config, overrides: 7)
heavy = {"jax", "numpy", "torch", "transformers", "flax"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


class Body:
    """Records its calls and returns the given exit codes in turn."""

    def __init__(self, *codes: int):
        self.codes = list(codes)
        self.calls: list[tuple[Config, list[str]]] = []

    def __call__(self, config: Config, overrides: list[str], keys: object = None) -> int:
        self.calls.append((config, overrides))
        return self.codes[len(self.calls) - 1] if self.codes else 0


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs each test in an empty folder and fails it if anything was written there."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def in_subprocess(repository: Path, *argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished process and the CPU seconds it took, which a busy machine does not inflate."""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv], env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done, seconds


def swept(*argv: str) -> list[SweptJob]:
    """The jobs of that sweep."""
    request = read_request("train", parse_arguments(["--multirun", *argv]))
    assert isinstance(request, SweepRequest)
    return request.jobs


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], "Keys people change most"),
        (["--cfg", "job"], "per_device_batch_size"),
        (["--cfg", "job", "hardware=tpu_v4_32", "model=sd21"], "name: tpu_v4_32"),
        (["--cfg", "job", "--package", "optimizer", "--resolve"], "kind: adamw"),
        (["--info", "defaults"], "hardware/cpu"),
    ],
)
def test_answers_come_quickly_and_without_jax(
    repository: Path, argv: list[str], expected: str
) -> None:
    done, seconds = in_subprocess(repository, *argv)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert seconds < 6, "measured: 1"


def test_a_composed_run_imports_no_jax_before_its_body(repository: Path) -> None:
    done, _ = in_subprocess(repository, "train.max_steps=3")
    assert (done.returncode, done.stderr) == (7, "")


def test_mistakes_fill_one_screen_and_exit_with_2(repository: Path) -> None:
    argv = ["--train_batch_size", "4", "optimizer.lrr=1", "hydra/launcher=slurm", "+a.b=1"]
    done, _ = in_subprocess(repository, *argv)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "sdx: 4 faults in the configuration; nothing was started.",
        "  --train_batch_size 4: a name of diffusers; use train.per_device_batch_size=4.",
        "  hydra/launcher=slurm: has no effect without --multirun; add --multirun.",
        "  optimizer.lrr=1: unknown key; did you mean optimizer.lr?",
        "  +a.b=1: unknown key; python -m sdx.train --help shows where to look.",
    ]


def test_shell_completion_is_hydras(repository: Path) -> None:
    line = {"COMP_LINE": "sdx-train model=sd2", "COMP_POINT": "19"}
    environment = {**os.environ, **line, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", SCRIPT, "-sc", "query=bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "model=sd21_base" in done.stdout.split()


def test_the_body_gets_the_configuration_and_the_overrides(empty_folder: Path) -> None:
    body = Body(3)
    assert run("train", ["run.seed=4", "--run"], body) == 3
    [(config, overrides)] = body.calls
    assert config == compose(["run.seed=4"]) and overrides == ["run.seed=4"]
    assert list(empty_folder.iterdir()) == []


def test_the_help_page_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", ["--help", "modle=3"], Body()) == 0
    page = capsys.readouterr().out
    assert max(len(line) for line in page.splitlines()) <= 100
    for group, options in group_options([CONF]).items():
        assert f"  {group} " in page
        assert all(option in page for option in options)
    assert "tiny*" in page and "outputs/<model>-<data>-<hash>/" in page


def test_own_options_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = tmp_path / "mine" / "optimizer" / "gentle.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("kind: adamw\nlr: 1e-9\n")
    folder = ["--config-dir", str(option.parent.parent)]
    body = Body()
    assert run("train", [*folder, "optimizer=gentle"], body) == 0
    assert body.calls[0][0].optimizer.lr == 1e-9
    assert run("train", [*folder, "--cfg", "job", "optimizer=gentle"], body) == 0
    assert "lr: 1.0e-09" in capsys.readouterr().out
    assert run("train", [*folder, "--help"], body) == 0
    assert "gentle" in capsys.readouterr().out
    found = swept(*folder, "optimizer=gentle,adamw")
    assert [job.config.optimizer.lr for job in found][0] == 1e-9


def test_from_a_run_folder_continues_in_that_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(compose(["run.seed=5"])))
    body = Body(0, 0, 0, 0)
    assert run("train", ["--from", str(folder), "train.max_steps=9"], body) == 0
    config, overrides = body.calls[0]
    assert (config.run.seed, config.train.max_steps) == (5, 9)
    assert overrides == ["train.max_steps=9"]
    assert Path(config.run.output_dir) / run_folder_name(config) == folder
    assert run("train", [f"--from={folder}", "run.name=other"], body) == 0
    assert body.calls[1][0].run.name == "other"
    assert run("train", ["--from", str(folder / "config.yaml")], body) == 0
    assert body.calls[2][0] == from_saved(folder)
    assert run("train", ["--from", str(folder), "run.output_dir=elsewhere"], body) == 0
    assert (body.calls[3][0].run.output_dir, body.calls[3][0].run.name) == ("elsewhere", None)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--from", "nowhere"], "--from=nowhere: no such file or folder."),
        (["--from"], "--from=: no such file or folder."),
        (["--config-dir", "nowhere"], "--config-dir=nowhere: no such file or folder."),
        (["--from", ".", "-m"], "--from=.: cannot be swept; drop --multirun."),
        (["--from", "."], "config.yaml: no such file"),
        (["--from", ".", "hydra/launcher=sdx_slurm"], "sdx_slurm: has no effect with --from"),
        (["--from", ".", "--cfg", "job"], "--from=.: a saved configuration cannot be shown"),
        (["--config-name", "x"], "--config-name: not a switch of sdx; --from RUN starts from"),
        (["--zebra", "3"], "--zebra 3: unknown flag; options are written KEY=VALUE."),
        (["--max-stepz", "3"], "options are written KEY=VALUE: train.max_steps=3."),
        (["--use_ema"], "--use_ema: a name of diffusers; use train.ema=true."),
        (["--validation_prompts", "a cat", "a dog"], "--validation_prompts a cat: a name of"),
        (["--mixed_precision=fp16"], "use model.activations_dtype=bfloat16"),
        (["--cfg", "job", "modle=tiny"], "modle=tiny: unknown key; did you mean model?"),
        (["-m", "optimizer.lr=1e-5,x"], "optimizer.lr=x: must be a number."),
        (["-m", "train.max_steps=1,2", "a=b=c"], "a=b=c: not readable"),
    ],
)
def test_refused(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = Body()
    assert run("train", argv, body) == 2
    assert expected in capsys.readouterr().err
    assert body.calls == []


def test_a_sweep_is_every_combination_in_folders_of_their_own() -> None:
    found = swept("optimizer.lr=1e-5,5e-6", "sample.every=0,5")
    values = [(job.config.optimizer.lr, job.config.sample.every) for job in found]
    assert values == [(1e-5, 0), (1e-5, 5), (5e-6, 0), (5e-6, 5)]
    assert len({run_folder_name(job.config) for job in found}) == 4


def test_a_job_of_a_sweep_is_the_run_it_would_be_alone() -> None:
    job = swept("optimizer.lr=1e-5,5e-6")[0]
    config, alone = job.config, compose(job.overrides)
    assert config.run.name == run_folder_name(alone)
    assert dataclasses.replace(config, run=alone.run, export=alone.export) == alone
    assert identity(config) == identity(alone)


def test_a_sweep_exports_only_what_it_is_told_to() -> None:
    found = [
        *swept("run.seed=0,1"),
        *swept("run.seed=0", "export.at_end=true"),
        *swept("run.seed=0", "export.push_to_hub=false"),
        *swept("export.push_to_hub=true", "export.hub_model_id=me/it"),
    ]
    exports = [job.config.export.at_end for job in found]
    assert exports == [False, False, True, False, True]
    assert compose(["run.seed=0"]).export.at_end


def test_a_plan_of_many_jobs_is_made_here_one_after_the_other(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = Body()
    assert run("plan", ["-m", "optimizer.lr=1e-5,5e-6", "sample.every=0,5"], body) == 0
    assert [config.optimizer.lr for config, _ in body.calls] == [1e-5, 1e-5, 5e-6, 5e-6]
    assert "job 2 of 4: optimizer.lr=1e-05 sample.every=5" in capsys.readouterr().out
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([], 0), ([0, 0], 0), ([1, 0], 1), ([2, 0], 1), ([0, 75], 75), ([1, 75], 1)],
)
def test_the_exit_code_of_a_sweep(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


def test_an_interrupted_job_ends_the_sweep() -> None:
    body = Body(75)
    assert run("plan", ["--multirun", "run.seed=0,1"], body) == 75
    assert len(body.calls) == 1


def test_a_job_that_raises_fails_the_sweep_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body(config: Config, overrides: list[str], keys: object) -> int:
        if config.run.seed == 0:
            raise RuntimeError("out of luck")
        return 0

    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    assert run("plan", ["--multirun", "run.seed=0,1"], body) == 1
    assert (sys.argv, os.environ.get("HYDRA_FULL_ERROR")) == before
    captured = capsys.readouterr()
    assert "out of luck" in captured.err and "job 2 of 2" in captured.out
