"""Sweeps on a real SLURM, as typed: arrays, a bad job, a killed driver, a snapshot, cancelling."""

import csv
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.slurm_cluster import Cluster
from tests.launchers.slurm_runs import (
    FOUR_PROCESSES,
    HELD,
    SLURM,
    STEPS,
    Shell,
    Typed,
    begin_all,
    until,
)
from tests.launchers.source_tree import SourceTree, copy_source

CANARY = "canary-7d1f0c52b9"
DESIGN = (*SLURM, *FOUR_PROCESSES, "optimizer.lr=1e-5,5e-6")
SIX = (*SLURM, "optimizer.lr=1e-5,5e-6,1e+30,2e-6,1e-6,5e-7", "train.max_bad_steps=1")
LATER = (*SLURM, "optimizer.lr=1e-5", "hydra.launcher.additional_parameters={begin: now+1hour}")
IN_TURN = (*SLURM, "optimizer.lr=1e-5,5e-6", "hydra.sweeper.max_parallel=1")
WITHOUT = (*SLURM, "optimizer.lr=1e-5,1e+30", "train.max_bad_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the shells here, each has its own below it: runs of the same maths share a name."""
    return tmp_path_factory.mktemp("shells")


@pytest.fixture(scope="module")
def later(slurm: Cluster, folder: Path) -> Iterator[Typed]:
    """From a source tree of its own, to start in an hour."""
    shell = Shell(copy_source(folder / "source"), slurm, folder / "later")
    with shell.typed("train", *LATER, "hydra.launcher.detach=true") as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def in_turn(slurm: Cluster, source_tree: SourceTree, folder: Path) -> Iterator[Typed]:
    """One job and then another, of which the first waits in its midst."""
    shell = Shell(source_tree, slurm, folder / "in_turn")
    with shell.typed("train", *IN_TURN, **HELD) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def design(slurm: Cluster, source_tree: SourceTree, folder: Path) -> Iterator[Typed]:
    shell = Shell(source_tree, slurm, folder / "design", {"HF_TOKEN": CANARY})
    with shell.typed("train", *DESIGN) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def six(slurm: Cluster, source_tree: SourceTree, folder: Path) -> Iterator[Typed]:
    shell = Shell(source_tree, slurm, folder / "six")
    with shell.typed("train", *SIX) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def without(
    slurm_without_accounting: Cluster, source_tree: SourceTree, folder: Path
) -> Iterator[Typed]:
    """Two jobs, of which one diverges, where nobody keeps accounts."""
    shell = Shell(source_tree, slurm_without_accounting, folder / "without")
    with shell.typed("train", *WITHOUT) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module", autouse=True)
def all_typed(request: pytest.FixtureRequest) -> None:
    """What the chosen tests need is typed before any of them waits: SLURM runs what has room."""
    begin_all(request, ("later", "in_turn", "design", "six", "without"))


def lr(value: float) -> str:
    return f"optimizer.lr={value}"  # as a sweep writes it down


def summary(shell: Shell) -> dict[str, dict[str, str]]:
    """Rows of the sweep's table by learning rate."""
    [path] = shell.outputs.glob("sweeps/*/summary.csv")
    with path.open() as file:
        return {f"{float(row['optimizer.lr']):g}": row for row in csv.DictReader(file)}


def queued(shell: Shell) -> list[str]:
    """The jobs that were handed in where it types: other tests hand in theirs meanwhile."""
    jobs = shell.cluster.run("squeue", "--noheader", "--format=%A %Z").splitlines()
    return [job for job in jobs if job.endswith(f" {shell.folder}")]


def test_pending_and_running_jobs_are_cancelled_and_stay_so(in_turn: Typed, slurm: Cluster) -> None:
    shell = in_turn.shell
    first, second = in_turn.run_of(lr(1e-5)), in_turn.run_of(lr(5e-6))
    shell.wait_until_held(first)
    queue = slurm.queue()
    assert (queue[shell.id(first)], queue[shell.id(second)]) == ("RUNNING", "PENDING")
    [sweep] = shell.outputs.glob("sweeps/*")
    code, output = shell.run("runs", str(sweep), "--cancel")
    assert code == 0, output
    shell.go(first)
    code, output = in_turn.ended()
    assert code not in (0, 2), output
    for run in (first, second):
        shell.wait_for_end(run)
        assert slurm.requeues(shell.id(run)) == 0
    assert shell.status(first) == "cancelled"
    assert len(shell.attempts(first)) == 1 and not shell.attempts(second)
    assert {row["status"] for row in summary(shell).values()} == {"cancelled"}


def test_a_partition_that_does_not_exist(
    slurm: Cluster, source_tree: SourceTree, folder: Path
) -> None:
    shell = Shell(source_tree, slurm, folder / "nowhere")
    code, output = shell.run("train", *SLURM, "hydra.launcher.partition=nowhere")
    assert code == 2, output
    assert "hydra.launcher.partition" in output and "nowhere" in output and "main" in output
    assert not queued(shell) and not shell.outputs.exists(), "nothing is left"


def test_what_sbatch_refuses_leaves_nothing_queued(
    slurm: Cluster, source_tree: SourceTree, folder: Path
) -> None:
    shell = Shell(source_tree, slurm, folder / "refused")
    refused = (*SLURM, "optimizer.lr=1e-5,5e-6", "hydra.launcher.gpus_per_node=5")
    code, output = shell.run("train", *refused)
    assert code not in (0, 75), output
    assert "node configuration is not available; nothing is queued" in output
    assert not queued(shell) and not shell.launches()


def test_a_driver_that_is_killed_hands_nothing_in_twice(six: Typed, slurm: Cluster) -> None:
    """Of the six jobs one diverges; the others do not mind."""
    shell = six.shell
    until(lambda: [job for job in shell.launches().values() if job["id"]][5:])
    before = {run: job["id"] for run, job in shell.launches().items()}
    six.processes.send(0, signal.SIGKILL)
    six.ended()
    code, output = shell.run("train", *SIX)
    assert code == 1, output
    assert {run: job["id"] for run, job in shell.launches().items()} == before
    assert [slurm.requeues(id) for id in before.values()] == [0] * 6
    rows = summary(shell)
    assert {lr: row["status"] for lr, row in rows.items() if row["status"] != "finished"} == {
        "1e+30": "failed"
    }
    bad = six.run_of(lr(1e30))
    assert "max_bad_steps" in output and "max_bad_steps" in shell.log(bad)
    assert slurm.end(shell.id(bad)) == ("FAILED", "1:0")


def test_the_sweep_of_the_design_is_an_array_of_jobs_of_two_nodes_with_two_processes(
    design: Typed, slurm: Cluster
) -> None:
    shell = design.shell
    code, output = design.ended()
    assert code == 0, output
    runs = [design.run_of(lr(1e-5)), design.run_of(lr(5e-6))]
    ids = [shell.id(run) for run in runs]
    array = ids[0].partition("_")[0]
    assert ids == [f"{array}_0", f"{array}_1"]
    for run, id in zip(runs, ids, strict=True):
        assert f"SLURM job {id}: {run}" in output
        assert shell.status(run) == "finished"
        assert [row["step"] for row in shell.rows(run)] == [*range(1, STEPS + 1)]
        assert slurm.requeues(id) == 0 and slurm.end(id) == ("COMPLETED", "0:0")
        said = slurm.run("scontrol", "show", "job", "--oneliner", id)
        assert " NumNodes=2 " in said and " NumTasks=4 " in said
        assert len(shell.launches()[run]["logs"]) == 4
        [attempt] = shell.attempts(run)
        assert attempt["outcome"] == "finished" and "127.0.0." in str(attempt["scheduler"])
    first, second = (shell.rows(run) for run in runs)
    assert first[0]["loss"] == second[0]["loss"] and first[-1]["loss"] != second[-1]["loss"]
    assert {row["status"] for row in summary(shell).values()} == {"finished"}
    [sweep] = shell.outputs.glob("sweeps/*")
    assert (sweep / "summary.json").is_file() and (sweep / "curves.png").is_file()


def test_a_token_in_the_environment_is_nowhere(design: Typed) -> None:
    shell = design.shell
    _, output = design.ended()
    assert CANARY not in output
    files = [path for path in shell.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sh" for path in files) and len(files) > 50
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    private = [*shell.outputs.glob("sweeps/*/slurm/1"), *shell.outputs.glob("launches/tiny-*")]
    assert [oct(path.stat().st_mode & 0o777) for path in private] == ["0o700"] * 3


def test_jobs_run_the_code_of_the_moment_they_were_handed_in(
    later: Typed, six: Typed, slurm: Cluster
) -> None:
    """The first of the six jobs has the same maths."""
    shell, source = later.shell, later.shell.tree.folder
    code, output = later.ended()
    assert code == 0, output
    [run] = shell.launches()
    assert slurm.queue()[shell.id(run)] == "PENDING"
    (source / "sdx" / "training" / "step.py").write_text("raise SystemExit('other code')\n")
    shutil.rmtree(source / "conf")
    shutil.rmtree(source / "launchers")
    slurm.run("scontrol", "update", f"jobid={shell.id(run)}", "starttime=now")
    shell.wait_for_end(run)
    assert shell.status(run) == "finished", shell.log(run)
    same = six.run_of(lr(1e-5))
    six.shell.wait_for_end(same)
    assert shell.rows(run) == six.shell.rows(same) != []
    assert shell.attempts(run)[0]["git_commit"], "known without the checkout"


def test_sweeps_need_no_accounting(without: Typed, slurm_without_accounting: Cluster) -> None:
    """Ten seconds after its end this cluster has forgotten a job."""
    shell, cluster = without.shell, slurm_without_accounting
    code, output = without.ended()
    assert code == 1, output
    assert shell.status(without.run_of(lr(1e-5))) == "finished"
    assert summary(shell)["1e+30"]["status"] == "failed" and "max_bad_steps" in output
    until(lambda: not cluster.run("squeue", "--noheader", "--states=all").strip())
    before = shell.launches()
    code, output = shell.run("train", *WITHOUT)
    assert code == 1 and shell.launches() == before, output
    assert "skipped" in output
