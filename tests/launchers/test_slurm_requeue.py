"""What befalls jobs on a real SLURM: signals, time limits, dead processes and nodes, faults.

All runs here have the same maths on two nodes with a process each; they differ in a tag.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.launchers.slurm_cluster import Cluster
from tests.launchers.slurm_runs import (
    HELD,
    SAVED,
    SLURM,
    STEPS,
    TWO_NODES,
    Shell,
    Typed,
    begin_all,
    tasks_of,
    until,
)  # fmt: skip
from tests.launchers.source_tree import SourceTree


def named(tag: str) -> tuple[str, str]:
    """A run with that tag, in a folder of its own."""
    return f"run.name={tag}", f"run.tags=[{tag}]"


JOB = (*SLURM, *TWO_NODES)
ARRAY = (*JOB, "run.tags=[plain],[told],[killed]")
LIMITED = (
    *JOB, *named("limited"), "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=50",
)  # fmt: skip
LOST = (*JOB, *named("lost"), "hydra.launcher.partition=spare")
FAULTY = (*JOB, *named("faulty"))
STOPPED = (*SLURM, *named("stopped"), "hydra.launcher.max_requeues=0")


def run_of(typed: Typed, tag: str) -> str:
    return typed.run_of(f"run.tags=[{tag}]")


def set_limit(shell: Shell, run: str, *, minutes: int) -> None:
    """Another time limit for its job, where that has not ended."""
    id = shell.id(run)
    if shell.cluster.queue().get(id) in ("PENDING", "RUNNING"):
        shell.cluster.run("scontrol", "update", f"jobid={id}", f"timelimit={minutes}")


@pytest.fixture(scope="module")
def shell(
    slurm: Cluster, source_tree: SourceTree, tmp_path_factory: pytest.TempPathFactory
) -> Shell:
    return Shell(source_tree, slurm, tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="module")
def limited(shell: Shell) -> Iterator[Typed]:
    """Told to stop after 55 to 70 seconds (SLURM is early), and not done by then; Ctrl-C ends the
    command meanwhile."""
    with shell.typed("train", *LIMITED, SDX_TEST_SLOW="10") as processes:
        typed = Typed(shell, processes)
        run = run_of(typed, "limited")
        until(lambda: shell.rows(run) or shell.cluster.requeues(shell.id(run)))
        if not shell.rows(run):  # a slow machine has not begun by then
            set_limit(shell, run, minutes=60)
        shell.wait_for_step(run, 1)  # the others need not compile
        processes.send(0, signal.SIGINT)
        yield typed


@pytest.fixture(scope="module")
def array(shell: Shell) -> Iterator[Typed]:
    detached = (*ARRAY, "hydra.launcher.detach=true")
    with shell.typed("train", *detached, **HELD) as processes:
        typed = Typed(shell, processes)
        shell.go(run_of(typed, "plain"))
        yield typed


@pytest.fixture(scope="module")
def lost(shell: Shell) -> Iterator[Typed]:
    with shell.typed("train", *LOST, **HELD) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def faulty(shell: Shell) -> Iterator[Typed]:
    with shell.typed("train", *FAULTY, SDX_TEST_RAISE="1:5") as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def stopped(shell: Shell) -> Iterator[Typed]:
    with shell.typed("train", *STOPPED, **HELD) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module", autouse=True)
def all_typed(request: pytest.FixtureRequest) -> None:
    """What the chosen tests need is typed before any of them waits: SLURM runs what has room."""
    begin_all(request, ("limited", "array", "lost", "faulty", "stopped"))


def assert_as_if_nothing_had_happened(shell: Shell, run: str) -> None:
    """To the last bit as the run that was left alone."""
    plain = shell.run_of("run.tags=[plain]")
    shell.wait_for_end(plain)
    assert shell.status(plain) == "finished", shell.log(plain)
    assert shell.status(run) == "finished", shell.log(run)
    assert [row["step"] for row in shell.rows(run)] == [*range(1, STEPS + 1)]
    assert shell.rows(run) == shell.rows(plain)


def outcomes(shell: Shell, run: str) -> list[str]:
    return [attempt["outcome"] for attempt in shell.attempts(run)]


def test_a_detached_sweep_returns_with_the_ids_of_its_jobs(array: Typed) -> None:
    code, output = array.ended()
    assert code == 0, output
    for tag in ("plain", "told", "killed"):
        run = run_of(array, tag)
        id = array.shell.id(run)
        assert f"SLURM job {id}: {run}" in output
        assert "_" in id, "an element of an array"


def test_jobs_told_to_stop_in_mid_step_go_on_bit_equal(array: Typed, slurm: Cluster) -> None:
    told, shell = run_of(array, "told"), array.shell
    shell.wait_until_held(told)
    slurm.run("scancel", "--signal=USR2", shell.id(told))
    shell.go(told)
    shell.wait_for_end(told)
    assert_as_if_nothing_had_happened(shell, told)
    first, second = shell.attempts(told)
    assert first["outcome"] == "interrupted" and SAVED < first["last_step"] < STEPS
    assert second["first_step"] == first["last_step"], "nothing is trained twice"
    assert slurm.end(shell.id(told)) == ("COMPLETED", "0:0")
    assert slurm.requeues(shell.id(told)) == 1


def test_a_killed_process_takes_its_job_back_into_the_queue(array: Typed, slurm: Cluster) -> None:
    killed, shell = run_of(array, "killed"), array.shell
    shell.wait_until_held(killed)
    os.kill(tasks_of(shell.id(killed))[1], signal.SIGKILL)
    shell.wait_for_end(killed)
    assert_as_if_nothing_had_happened(shell, killed)
    first, second = shell.attempts(killed)
    assert first["outcome"] == "interrupted", "rank 0 was ended with it"
    assert second["first_step"] == SAVED, "its last checkpoint"
    log = shell.log(killed)
    assert "task 1: Killed" in log and "requeued, 1 of at most 2 retries" in log
    assert slurm.requeues(shell.id(killed)) == 1


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(
    array: Typed, lost: Typed, slurm: Cluster
) -> None:
    run, shell = run_of(lost, "lost"), lost.shell
    id = shell.id(run)
    shell.wait_until_held(run)
    words = slurm.run("scontrol", "show", "job", "--oneliner", id).split()
    nodes = next(word.partition("=")[2] for word in words if word.startswith("NodeList="))
    second = slurm.run("scontrol", "show", "hostnames", nodes).split()[1]
    slurm.run("scontrol", "update", f"nodename={second}", "state=down", "reason=test")
    until(lambda: slurm.requeues(id) == 1)
    code, output = lost.ended()
    assert code == 0, output
    assert_as_if_nothing_had_happened(shell, run)
    assert shell.attempts(run)[-1]["first_step"] == SAVED, "its last checkpoint"
    assert slurm.end(id) == ("COMPLETED", "0:0")


def test_a_fault_of_one_rank_fails_the_job_and_is_named(faulty: Typed, slurm: Cluster) -> None:
    code, output = faulty.ended()
    assert code == 1, output
    run, shell = run_of(faulty, "faulty"), faulty.shell
    assert slurm.end(shell.id(run)) == ("FAILED", "1:0")
    until(lambda: slurm.accounted(shell.id(run)) == "FAILED")
    assert slurm.requeues(shell.id(run)) == 0
    assert shell.status(run) == "failed"
    rank, fault = "process 1 of 2 on ", "ArithmeticError: a fault planted in rank 1"
    assert rank in shell.log(run) and fault in shell.log(run)
    assert "Traceback" in shell.log(run, 1) and fault in shell.log(run, 1)
    [summary] = [
        path for path in shell.outputs.glob("sweeps/*/summary.md") if rank in path.read_text()
    ]
    assert fault in summary.read_text()
    assert rank in output and fault in output


def test_an_interrupted_job_is_never_done_and_the_same_command_goes_on(stopped: Typed) -> None:
    """It may not requeue itself, so it ends where it was told to stop."""
    run, shell = run_of(stopped, "stopped"), stopped.shell
    shell.wait_until_held(run)
    before = shell.id(run)
    shell.cluster.run("scancel", "--signal=USR2", before)
    shell.go(run)
    code, output = stopped.ended()
    assert code == 75, output
    assert shell.status(run) == "interrupted"
    summaries = [path.read_text() for path in shell.outputs.glob("sweeps/*/summary.csv")]
    assert any("hydra.launcher.max_requeues" in text for text in summaries), summaries
    code, output = shell.run("train", *STOPPED)
    assert code == 0, output
    assert shell.status(run) == "finished" and shell.id(run) != before
    assert outcomes(shell, run) == ["interrupted", "finished"]
    code, output = shell.run("train", *STOPPED)
    assert code == 0 and "skipped" in output, output
    assert outcomes(shell, run) == ["interrupted", "finished"]


def test_a_run_longer_than_its_time_limit_goes_on_in_the_next_job(
    limited: Typed, array: Typed, slurm: Cluster
) -> None:
    run, shell = run_of(limited, "limited"), limited.shell
    id = shell.id(run)
    code, output = limited.ended()
    assert code == 75 and "1 job goes on without this process" in output, output
    assert "--follow" in output and "--cancel" in output
    until(lambda: slurm.requeues(id), lambda: shell.log(run))
    set_limit(shell, run, minutes=60)
    code, output = shell.run("train", *LIMITED)
    assert code == 0 and shell.id(run) == id, output
    assert_as_if_nothing_had_happened(shell, run)
    *before, last = outcomes(shell, run)  # a slow machine has not begun when it is told to stop
    assert {*before} <= {"interrupted"} and last == "finished"
    assert "requeued, 1 of at most 20 requeues" in shell.log(run)


def test_a_detached_sweep_is_collected_by_the_same_command(array: Typed) -> None:
    shell = array.shell
    for tag in ("plain", "told", "killed"):
        shell.go(run_of(array, tag))
        shell.wait_for_end(run_of(array, tag))
    before = shell.launches()
    code, output = shell.run("train", *ARRAY)
    assert code == 0, output
    assert output.count("skipped") >= 3 and shell.launches() == before, "nothing is handed in"
    code, output = shell.run("runs", "outputs")
    assert code == 0 and output.count("finished") >= 3, output
    code, output = shell.run("runs", f"outputs/{run_of(array, 'told')}", "--logs")
    assert code == 0 and f"finished {STEPS} steps" in output, output
