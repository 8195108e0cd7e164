"""What befalls jobs on a real SLURM: signals, time limits, dead processes and nodes, faults.

All runs here have the same maths on two nodes with a process each; they differ in a tag.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launchers.slurm_cluster import Cluster
from tests.launchers.slurm_runs import SLURM, STEPS, TWO_NODES, Shell, tasks_of, until
from tests.launchers.source_tree import SourceTree
from tests.processes import Processes

JOB = (*SLURM, *TWO_NODES)
ARRAY = (*JOB, "run.tags=[plain],[told],[killed]")
LIMITED = (*JOB, "run.tags=[limited]", "hydra.launcher.timeout_min=1",
           "hydra.launcher.signal_delay_s=15")  # fmt: skip
LOST = (*JOB, "run.tags=[lost]", "hydra.launcher.exclusive=true")
FAULTY = (*JOB, "run.tags=[faulty]")
STOPPED = (*SLURM, "run.tags=[stopped]", "hydra.launcher.max_requeues=0")


class Begun:
    """All commands of this file, typed at once: SLURM runs what there is room for."""

    def __init__(self, shell: Shell, commands: ExitStack):
        def typed(arguments: tuple[str, ...], **variables: str) -> Processes:
            return commands.enter_context(shell.typed("train", *arguments, **variables))

        self.shell = shell
        # Far longer than its time limit, the first time.
        self.limited = typed(LIMITED, SDX_TEST_SLOW="7")
        self.array = typed((*ARRAY, "hydra.launcher.detach=true"), SDX_TEST_SLOW="1.5")
        self.lost = typed(LOST, SDX_TEST_SLOW="1.5")
        self.faulty = typed(FAULTY, SDX_TEST_RAISE="1:5")
        self.stopped = typed(STOPPED, SDX_TEST_SLOW="1.5")

    def run(self, tag: str) -> str:
        """The run with that tag, once its job was handed in."""
        shell, override = self.shell, f"run.tags=[{tag}]"

        def is_there() -> bool:
            jobs = [path.read_text() for path in shell.outputs.glob("launches/*/job.json")]
            return any(override in text for text in jobs) and bool(
                shell.launches().get(shell.run_of(override), {}).get("id")
            )

        until(is_there)
        return shell.run_of(override)

    def assert_as_if_nothing_had_happened(self, run: str) -> None:
        """To the last bit as the run that was left alone."""
        plain = self.run("plain")
        self.shell.wait_for_end(plain)
        assert self.shell.status(plain) == "finished", self.shell.log(plain)
        assert self.shell.status(run) == "finished", self.shell.log(run)
        assert [row["step"] for row in self.shell.rows(run)] == [*range(1, STEPS + 1)]
        assert self.shell.rows(run) == self.shell.rows(plain)


@pytest.fixture(scope="module")
def begun(
    slurm: Cluster, source_tree: SourceTree, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Begun]:
    with ExitStack() as commands:
        yield Begun(Shell(source_tree, slurm, tmp_path_factory.mktemp("shell")), commands)


def outcomes(shell: Shell, run: str) -> list[str]:
    return [attempt["outcome"] for attempt in shell.attempts(run)]


def test_a_detached_sweep_returns_with_the_ids_of_its_jobs(begun: Begun) -> None:
    ended = begun.array.end(600)
    assert ended.codes == [0], ended
    for tag in ("plain", "told", "killed"):
        run = begun.run(tag)
        id = begun.shell.id(run)
        assert f"SLURM job {id}: {run}" in ended.outputs[0]
        assert "_" in id, "an element of an array"


def test_jobs_told_to_stop_in_mid_step_go_on_bit_equal(begun: Begun, slurm: Cluster) -> None:
    told = begun.run("told")
    begun.shell.wait_for_step(told, 5)
    slurm.run("scancel", "--signal=USR2", begun.shell.id(told))
    begun.shell.wait_for_end(told)
    begun.assert_as_if_nothing_had_happened(told)
    first, second = begun.shell.attempts(told)
    assert first["outcome"] == "interrupted" and 5 <= first["last_step"] < STEPS
    assert second["first_step"] == first["last_step"], "nothing is trained twice"
    assert slurm.ledger(begun.shell.id(told))[-1] == ("COMPLETED", "0:0")
    assert len(slurm.ledger(begun.shell.id(told))) == 2, "started twice"


def test_a_killed_process_takes_its_job_back_into_the_queue(begun: Begun, slurm: Cluster) -> None:
    killed = begun.run("killed")
    begun.shell.wait_for_step(killed, 5)
    os.kill(tasks_of(begun.shell.id(killed))[1], signal.SIGKILL)
    begun.shell.wait_for_end(killed)
    begun.assert_as_if_nothing_had_happened(killed)
    first, second = begun.shell.attempts(killed)
    assert first["outcome"] != "finished" and second["first_step"] == 4, "its last checkpoint"
    log = begun.shell.log(killed)
    assert "task 1: Killed" in log and "requeued, 1 of at most 2 retries" in log
    assert len(slurm.ledger(begun.shell.id(killed))) == 2


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    begun: Begun, slurm: Cluster
) -> None:
    lost = begun.run("lost")
    begun.shell.wait_for_step(lost, 5)
    scontrol = slurm.run("scontrol", "show", "job", "--oneliner", begun.shell.id(lost))
    nodes = next(word for word in scontrol.split() if word.startswith("NodeList=")).split("=")[1]
    second = slurm.run("scontrol", "show", "hostnames", nodes).split()[1]
    slurm.run("scontrol", "update", f"nodename={second}", "state=down", "reason=test")
    until(lambda: slurm.ledger(begun.shell.id(lost))[0][0] == "NODE_FAIL")
    slurm.run("scontrol", "update", f"nodename={second}", "state=resume")
    ended = begun.lost.end(900)
    assert ended.codes == [0], ended
    begun.assert_as_if_nothing_had_happened(lost)
    assert begun.shell.attempts(lost)[-1]["first_step"] == 4, "its last checkpoint"
    assert slurm.ledger(begun.shell.id(lost))[-1] == ("COMPLETED", "0:0")


def test_a_fault_of_one_rank_fails_the_job_and_is_named(begun: Begun, slurm: Cluster) -> None:
    ended = begun.faulty.end(900)
    assert ended.codes == [1], ended
    faulty = begun.run("faulty")
    [(state, code)] = slurm.ledger(begun.shell.id(faulty))  # not requeued
    assert (state, code) == ("FAILED", "1:0")
    assert begun.shell.status(faulty) == "failed"
    rank = "process 1 of 2 on "
    assert rank in begun.shell.log(faulty)
    assert "ArithmeticError: a fault planted in rank 1" in begun.shell.log(faulty, 1)
    [summary] = begun.shell.outputs.glob("sweeps/*/summary.md")
    assert rank in summary.read_text() and "a fault planted in rank 1" in summary.read_text()
    assert rank in ended.outputs[0]


def test_an_interrupted_job_is_never_done_and_the_same_command_goes_on(begun: Begun) -> None:
    """It may not requeue itself, so it ends where it was told to stop."""
    stopped, shell = begun.run("stopped"), begun.shell
    shell.wait_for_step(stopped, 5)
    shell.cluster.run("scancel", "--signal=USR2", shell.id(stopped))
    ended = begun.stopped.end(900)
    assert ended.codes == [75], ended
    assert shell.status(stopped) == "interrupted"
    assert "max_requeues" in ended.outputs[0]
    before = shell.id(stopped)
    code, output = shell.run("train", *STOPPED)
    assert code == 0, output
    assert shell.status(stopped) == "finished" and shell.id(stopped) != before
    assert outcomes(shell, stopped) == ["interrupted", "finished"]
    code, output = shell.run("train", *STOPPED)
    assert code == 0 and "skipped" in output, output
    assert outcomes(shell, stopped) == ["interrupted", "finished"]


def test_a_run_longer_than_its_time_limit_goes_on_in_the_next_job(
    begun: Begun, slurm: Cluster
) -> None:
    limited = begun.run("limited")
    id = begun.shell.id(limited)
    until(lambda: len(slurm.ledger(id)) == 2, lambda: begun.shell.log(limited))
    slurm.run("scontrol", "update", f"jobid={id}", "timelimit=60")  # a slow machine needs it
    ended = begun.limited.end(900)
    assert ended.codes == [0], ended
    begun.assert_as_if_nothing_had_happened(limited)
    assert outcomes(begun.shell, limited) == ["interrupted", "finished"]
    assert "requeued, 1 of at most 20 requeues" in begun.shell.log(limited)


def test_a_detached_sweep_is_collected_by_the_same_command(begun: Begun, tmp_path: Path) -> None:
    shell = begun.shell
    for tag in ("plain", "told", "killed"):
        shell.wait_for_end(begun.run(tag))
    before = shell.launches()
    code, output = shell.run("train", *ARRAY)
    assert code == 0, output
    assert output.count("skipped") >= 3 and shell.launches() == before, "nothing is handed in"
    code, output = shell.run("runs", "outputs")
    assert code == 0 and output.count("finished") >= 3, output
