"""Encodings and a search on a real SLURM, as typed; their drivers are killed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdx.config.launching import SearchSampler, SearchSettings
from sdx.data.cache.records import MomentsRecord
from sdx.data.cache.rows import CachedMoments, Records
from sdx_launchers.search.space import read_space
from sdx_launchers.search.study import Study
from sdx_launchers.sweep.objective import Objective
from tests.launchers.slurm_cluster import Cluster
from tests.launchers.slurm_runs import HELD, SLURM, Shell, Typed, begin_all, until
from tests.launchers.source_tree import SourceTree

NUM_EXAMPLES = 40
HALF = 2.0**-11  # what rounding to float16 changes, relative
DATA = (
    f"data.num_examples={NUM_EXAMPLES}", "train.per_device_batch_size=null",
    "train.global_batch_size=4",
    f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
)  # fmt: skip
ON_SLURM = ("--multirun", "run_on=slurm", "hydra.launcher.poll_s=0.5")
TWO_TASKS = ("hardware.num_devices=2", "mesh.ici.data=2", "hydra.launcher.tasks_per_node=2")
IN_AN_HOUR = "hydra.launcher.additional_parameters={begin: now+1hour}"

# Judged by its rate, so that nothing depends on noise: the bad trial is worse from its first step,
# and would take hours. Good ones differ in their seed, which costs no compilation.
GOOD, BAD = ("1e-5", "8"), ("5e-6", "1000000")
VALUES = [
    "run.seed=1,2,3",
    f"optimizer.lr={GOOD[0]},{GOOD[0]},{BAD[0]}",
    f"train.max_steps={GOOD[1]},{GOOD[1]},{BAD[1]}",
]
ZIP = "run.seed+optimizer.lr+train.max_steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shells")


@pytest.fixture(scope="module")
def encoding(slurm: Cluster, source_tree: SourceTree, folder: Path) -> Iterator[Typed]:
    """Two encodings that do not begin before it is said so."""
    shell = Shell(source_tree, slurm, folder / "encoding")
    with shell.typed("encode", *encode(), IN_AN_HOUR) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module")
def search(slurm: Cluster, source_tree: SourceTree, folder: Path) -> Iterator[Typed]:
    """Three trials, two at a time, of which the first two wait in their midst."""
    shell = Shell(source_tree, slurm, folder / "search")
    with shell.typed("train", *searching(), **HELD) as processes:
        yield Typed(shell, processes)


@pytest.fixture(scope="module", autouse=True)
def all_typed(request: pytest.FixtureRequest) -> None:
    begin_all(request, ("search", "encoding"))


def encode(resolution: str = "16,32") -> tuple[str, ...]:
    return (*ON_SLURM, *TWO_TASKS, *DATA, "data.cache_dir=cache", f"data.resolution={resolution}")


def contents(cache: Path) -> dict[str, list[MomentsRecord]]:
    """What each cache there holds; each must be whole."""
    found: dict[str, list[MomentsRecord]] = {}
    for folder in cache.iterdir():
        digest = bytes.fromhex(folder.name.partition("-")[2])
        moments = CachedMoments(Records(folder, digest))
        found[folder.name] = [moments.read(index, 0) for index in range(NUM_EXAMPLES)]
    return found


def test_encodings_are_those_of_this_machine(
    encoding: Typed, slurm: Cluster, source_tree: SourceTree, folder: Path
) -> None:
    """Two processes each; the command is killed while they wait, and typed again. Training with the
    same configuration is something else, which has not begun."""
    shell = encoding.shell
    until(lambda: [job for job in shell.launches().values() if job.get("released")][1:])
    before = {run: job["id"] for run, job in shell.launches().items()}
    encoding.processes.send(0, signal.SIGKILL)
    encoding.ended()
    training = ("hydra.sweeper.dry_run=true", "data.resolution=16")
    code, output = shell.run("train", *ON_SLURM, *TWO_TASKS, *DATA, *training)
    assert code == 0 and "waits" not in output and "#SBATCH" in output, output
    with shell.typed("encode", *encode()) as processes:
        typed = Typed(shell, processes)
        processes.wait_until_said(0, "this sweep:")
        array = before[min(before)].partition("_")[0]
        slurm.run("scontrol", "update", f"jobid={array}", "starttime=now")
        alone = Shell(source_tree, slurm, folder / "alone")
        assert alone.run("encode", *DATA, "data.cache_dir=cache", "data.resolution=32")[0] == 0
        code, output = typed.ended()
    assert code == 0 and output.count("waits for job") == 2, output
    assert {run: job["id"] for run, job in shell.launches().items()} == before
    ours, theirs = contents(shell.folder / "cache"), contents(alone.folder / "cache")
    [name] = theirs
    assert len(ours) == 2 and name in ours
    for one, other in zip(ours[name], theirs[name], strict=True):
        np.testing.assert_allclose(one.moments, other.moments, rtol=2 * HALF, atol=2e-4)
        np.testing.assert_array_equal(one.tokens, other.tokens)

    code, output = shell.run("encode", *encode("16"))
    assert code == 0, output
    [run] = [run for run, job in shell.launches().items() if job["id"] != before[run]]
    log = shell.log(run)
    assert "files are there and whole" in log and f"of {NUM_EXAMPLES} images" not in log, log
    assert slurm.end(shell.id(run)) == ("COMPLETED", "0:0")


def searching() -> tuple[str, ...]:
    seed = next(number for number in range(10_000) if is_bad_one_last(number))
    own = [text for text in SLURM if not text.startswith("train.max_steps=")]
    return (
        *own, "hydra/sweeper=sdx_search", *VALUES, f"hydra.sweeper.zip=[{ZIP}]",
        "hydra.sweeper.n_trials=3", "hydra.sweeper.max_parallel=2", "hydra.sweeper.sampler=random",
        f"hydra.sweeper.seed={seed}", "hydra.sweeper.objective=lr:max",
        "hydra.sweeper.n_startup_trials=2", "hydra.sweeper.name=mine",
    )  # fmt: skip


def is_bad_one_last(seed: int) -> bool:
    """Whether the search with that seed asks the bad trial third, and the good ones before."""
    space, _ = read_space({}, VALUES, [ZIP])
    settings = SearchSettings(sampler=SearchSampler.random, seed=seed)
    study = Study(None, space, settings, Objective("lr"))
    asked = [space.overrides(study.ask().values) for _ in range(3)]
    seeds = [text for overrides in asked for text in overrides if text.startswith("run.seed=")]
    return len({*seeds}) == 3 and seeds[2] == "run.seed=3"


def trials(shell: Shell) -> list[str]:
    """Names of the runs of the search, in the order they were asked."""
    path = shell.outputs / "sweeps" / "mine" / "sweep.json"
    jobs: list[dict[str, Any]] = json.loads(path.read_text())["jobs"] if path.exists() else []
    return [job["name"] for job in jobs]


def test_a_killed_search_goes_on_with_the_same_jobs_and_prunes(
    search: Typed, slurm: Cluster
) -> None:
    shell = search.shell
    until(lambda: len(trials(shell)) == 2, lambda: search.processes.output(0))
    good = trials(shell)
    for run in good:
        until(lambda run=run: run in shell.launches() and shell.id(run))
        shell.wait_until_held(run)
    before = {run: shell.id(run) for run in good}
    search.processes.send(0, signal.SIGKILL)
    search.ended()
    with shell.typed("train", *searching()) as processes:
        processes.wait_until_said(0, "trial 1: ")
        for run in good:
            shell.go(run)
        code, output = Typed(shell, processes).ended()
    assert code == 0, output
    assert "so far: 2 running" in output and "3 of 3 trials: 2 complete, 1 pruned" in output, output
    assert trials(shell)[:2] == good
    assert {run: shell.id(run) for run in good} == before, "nothing was handed in twice"
    bad = trials(shell)[2]
    assert [shell.status(run) for run in trials(shell)] == ["finished", "finished", "pruned"]
    assert [slurm.requeues(shell.id(run)) for run in trials(shell)] == [0, 0, 0]
    assert slurm.end(shell.id(bad))[0] == "FAILED", "it ends as one that was interrupted"
    [attempt] = shell.attempts(bad)
    saved = shell.outputs / bad / "checkpoints" / str(attempt["last_step"]) / "manifest.json"
    assert saved.exists() and [len(shell.attempts(run)) for run in good] == [1, 1]
    code, output = shell.run("train", *searching())
    assert code == 0 and len(shell.launches()) == 3, output
