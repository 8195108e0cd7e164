"""Sweeps on a real SLURM, as typed: arrays, a bad job, a killed driver, a snapshot, cancelling."""

import csv
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launchers.slurm_cluster import Cluster
from tests.launchers.slurm_runs import FOUR_PROCESSES, SLURM, STEPS, Shell, until
from tests.launchers.source_tree import SourceTree, copy_source
from tests.processes import Processes

CANARY = "canary-7d1f0c52b9"
DESIGN = (*SLURM, *FOUR_PROCESSES, "optimizer.lr=1e-5,5e-6")
SIX = (*SLURM, "optimizer.lr=1e-5,5e-6,1e+30,2e-6,1e-6,5e-7", "train.max_bad_steps=1")
LATER = (*SLURM, "optimizer.lr=1e-5", "hydra.launcher.additional_parameters={begin: now+1hour}")
TWO_IN_TURN = (*SLURM, "optimizer.lr=1e-5,5e-6", "hydra.sweeper.max_parallel=1")
WITHOUT = (*SLURM, "optimizer.lr=1e-5,1e+30", "train.max_bad_steps=1")


class Begun:
    """All commands of this file that need no other before them."""

    def __init__(
        self, tree: SourceTree, changed: SourceTree, clusters: tuple[Cluster, Cluster],
        folder: Path, commands: ExitStack,
    ):  # fmt: skip
        cluster, without = clusters

        def typed(shell: Shell, arguments: tuple[str, ...], **variables: str) -> Processes:
            return commands.enter_context(shell.typed("train", *arguments, **variables))

        self.later = Shell(changed, cluster, folder / "later")
        self.design = Shell(tree, cluster, folder / "design", {"HF_TOKEN": CANARY})
        self.six = Shell(tree, cluster, folder / "six")
        self.in_turn = Shell(tree, cluster, folder / "in_turn")
        self.without = Shell(tree, without, folder / "without")
        self.later_typed = typed(self.later, (*LATER, "hydra.launcher.detach=true"))
        self.in_turn_typed = typed(self.in_turn, TWO_IN_TURN, SDX_TEST_SLOW="20")
        self.design_typed = typed(self.design, DESIGN)
        self.six_typed = typed(self.six, SIX)
        self.without_typed = typed(self.without, WITHOUT)


@pytest.fixture(scope="module")
def begun(
    slurm: Cluster,
    slurm_without_accounting: Cluster,
    source_tree: SourceTree,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Begun]:
    folder = tmp_path_factory.mktemp("shells")
    changed = copy_source(folder / "source")
    with ExitStack() as commands:
        clusters = (slurm, slurm_without_accounting)
        yield Begun(source_tree, changed, clusters, folder, commands)


def named(shell: Shell, lr: str) -> str:
    return shell.run_of(f"optimizer.lr={lr}")


def summary(shell: Shell) -> dict[str, dict[str, str]]:
    """Rows of the sweep's table by learning rate."""
    [path] = shell.outputs.glob("sweeps/*/summary.csv")
    with path.open() as file:
        return {f"{float(row['optimizer.lr']):g}": row for row in csv.DictReader(file)}


def test_pending_and_running_jobs_are_cancelled_and_stay_so(begun: Begun, slurm: Cluster) -> None:
    shell = begun.in_turn
    until(lambda: len(shell.launches()) == 2)
    first, second = named(shell, "1e-5"), named(shell, "5e-6")
    shell.wait_for_step(first, 4)
    assert slurm.queue()[shell.id(first)] == "RUNNING"
    assert slurm.queue()[shell.id(second)] == "PENDING"
    code, output = shell.run("runs", "outputs", "--cancel")
    assert code == 0, output
    ended = begun.in_turn_typed.end(900)
    assert ended.codes[0] != 0, ended
    for run in (first, second):
        shell.wait_for_end(run)
        assert len(slurm.ledger(shell.id(run))) == 1, "not requeued"
    assert shell.status(first) == "cancelled"
    assert len(shell.attempts(first)) == 1 and not shell.attempts(second)
    assert {row["status"] for row in summary(shell).values()} == {"cancelled"}


def test_a_partition_that_does_not_exist(begun: Begun, slurm: Cluster) -> None:
    shell = Shell(begun.design.tree, slurm, begun.design.folder.parent / "nowhere")
    before = slurm.run("squeue", "--noheader", "--format=%A").split()
    code, output = shell.run("train", *SLURM, "hydra.launcher.partition=nowhere")
    assert code == 2, output
    assert "hydra.launcher.partition" in output and "nowhere" in output and "main" in output
    assert set(slurm.run("squeue", "--noheader", "--format=%A").split()) <= {*before}
    assert not shell.outputs.exists(), "nothing is left there"


def test_what_sbatch_refuses_leaves_nothing_queued(begun: Begun, slurm: Cluster) -> None:
    shell = Shell(begun.design.tree, slurm, begun.design.folder.parent / "refused")
    before = slurm.run("squeue", "--noheader", "--format=%A").split()
    code, output = shell.run("train", *SLURM, "optimizer.lr=1e-5,5e-6", "hydra.launcher.nodes=1",
                             "hydra.launcher.gpus_per_node=5")  # fmt: skip
    assert code not in (0, 75), output
    assert "sbatch: error" in output and "node configuration is not available" in output
    assert set(slurm.run("squeue", "--noheader", "--format=%A").split()) <= {*before}
    assert not shell.launches()


def test_a_driver_that_is_killed_hands_nothing_in_twice(begun: Begun, slurm: Cluster) -> None:
    """Of the six jobs one diverges; the others do not mind."""
    shell = begun.six
    until(lambda: [job for job in shell.launches().values() if job["id"]][5:])
    before = shell.launches()
    for run in before:
        begun.six_typed.wait_until_said(0, before[run]["id"], timeout_s=600)
    begun.six_typed.send(0, signal.SIGKILL)
    begun.six_typed.end(60)
    code, output = shell.run("train", *SIX)
    assert code == 1, output
    assert {run: job["id"] for run, job in shell.launches().items()} == {
        run: job["id"] for run, job in before.items()
    }
    assert [len(slurm.ledger(job["id"])) for job in before.values()] == [1] * 6
    rows = summary(shell)
    assert [lr for lr, row in rows.items() if row["status"] != "finished"] == ["1e+30"]
    assert rows["1e+30"]["status"] == "failed" and "max_bad_steps" in output
    bad = named(shell, "1e+30")
    assert "max_bad_steps" in shell.log(bad)
    assert slurm.ledger(shell.id(bad)) == [("FAILED", "1:0")]


def test_the_sweep_of_the_design_is_an_array_of_jobs_of_two_nodes_with_two_processes(
    begun: Begun, slurm: Cluster
) -> None:
    shell = begun.design
    ended = begun.design_typed.end(900)
    assert ended.codes == [0], ended
    runs = [named(shell, "1e-5"), named(shell, "5e-6")]
    ids = [shell.id(run) for run in runs]
    assert [id.split("_")[1] for id in ids] == ["0", "1"] and len({id[:-2] for id in ids}) == 1
    for run, id in zip(runs, ids, strict=True):
        assert id in ended.outputs[0]
        assert shell.status(run) == "finished"
        assert [row["step"] for row in shell.rows(run)] == [*range(1, STEPS + 1)]
        [attempt] = shell.attempts(run)
        assert "127.0.0.[1-2]" in str(attempt) or "127.0.0." in str(attempt), attempt
        assert slurm.ledger(id) == [("COMPLETED", "0:0")]
        said = slurm.run("scontrol", "show", "job", "--oneliner", id)
        assert " NumNodes=2 " in said and " NumTasks=4 " in said
        assert len(shell.launches()[run]["logs"]) == 4
    first, second = (shell.rows(run) for run in runs)
    assert first[0]["loss"] == second[0]["loss"] and first[-1]["loss"] != second[-1]["loss"]
    assert {row["status"] for row in summary(shell).values()} == {"finished"}
    [sweep] = shell.outputs.glob("sweeps/*")
    assert (sweep / "summary.json").is_file() and (sweep / "curves.png").is_file()


def test_a_token_in_the_environment_is_nowhere(begun: Begun) -> None:
    shell = begun.design
    ended = begun.design_typed.end(900)
    assert CANARY not in ended.outputs[0]
    files = [path for path in shell.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".sh" for path in files) and len(files) > 50
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    [scripts] = shell.outputs.glob("sweeps/*/slurm/1")
    private = [scripts, *shell.outputs.glob("launches/*")]
    assert {oct(path.stat().st_mode & 0o777) for path in private} == {"0o700"}


def test_jobs_run_the_code_of_the_moment_they_were_handed_in(begun: Begun, slurm: Cluster) -> None:
    """The first of the six jobs has the same maths."""
    shell, source = begun.later, begun.later.tree.folder
    assert begun.later_typed.end(600).codes == [0]
    [run] = shell.launches()
    assert slurm.queue()[shell.id(run)] == "PENDING"
    (source / "sdx" / "training" / "step.py").write_text("raise SystemExit('other code')\n")
    (source / "sdx" / "training" / "faults.py").unlink()
    shutil.rmtree(source / "conf")
    shutil.rmtree(source / "launchers")
    slurm.run("scontrol", "update", f"jobid={shell.id(run)}", "starttime=now")
    shell.wait_for_end(run)
    assert shell.status(run) == "finished", shell.log(run)
    same = named(begun.six, "1e-5")
    begun.six.wait_for_end(same)
    assert shell.rows(run) == begun.six.rows(same) != []
    [attempt] = shell.attempts(run)
    assert attempt["git_commit"], "known without a checkout"


def test_sweeps_need_no_accounting(begun: Begun, slurm_without_accounting: Cluster) -> None:
    """Ten seconds after its end this cluster has forgotten a job."""
    shell = begun.without
    ended = begun.without_typed.end(900)
    assert ended.codes == [1], ended
    assert shell.status(named(shell, "1e-5")) == "finished"
    bad = named(shell, "1e+30")
    assert shell.status(bad) == "failed"
    assert summary(shell)["1e+30"]["status"] == "failed" and "max_bad_steps" in ended.outputs[0]
    until(lambda: not slurm_without_accounting.run("squeue", "-h", "--states=all").strip())
    before = shell.launches()
    code, output = shell.run("train", *WITHOUT)
    assert code == 1 and shell.launches() == before, output
    assert "skipped" in output
