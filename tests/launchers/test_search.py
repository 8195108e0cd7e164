"""Searches whose runs are written by the test: what is asked, pruned, answered and gone on with."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.types import Override

from sdx.config.arguments import parse_arguments
from sdx.config.compose import compose
from sdx.config.errors import ConfigError, Problem
from sdx.config.identity import folder_names
from sdx.config.launching import Pruner, SearchSampler, SearchSettings
from sdx.config.overrides import parse
from sdx.config.schema import Config, OptimizerKind
from sdx.config.sweeping import SweepRequest, SweptJob, read_request
from sdx.record.files import write_text
from sdx.record.status import Status, write_status
from sdx.record.stop_request import read_stop
from sdx_launchers.jobs import Ended, Job
from sdx_launchers.search.driver import search

STEPS = 6
LR = "optimizer.lr=tag(log,interval(1e-6,1e-3))"


class Killed(BaseException):
    """What ends a search of the test as kill -9 would: nothing is tidied up."""


@dataclass
class Run:
    """A run that makes a step whenever it is looked at."""

    job: Job
    world: "World"
    id: str = "1"
    is_stopped: bool = False
    num_looks: int = 0

    def poll(self) -> Ended | None:
        paths = self.job.paths
        if self.num_looks < self.world.looks_to_start:
            self.num_looks += 1
            return None
        if self.num_looks == self.world.looks_to_start:
            self.num_looks += 1
            paths.stop.unlink(missing_ok=True)
            return None
        rows = paths.metrics.read_text().splitlines() if paths.metrics.exists() else []
        asked = read_stop(paths)
        self.world.looks += 1
        if self.world.looks == self.world.killed_at:
            raise Killed
        if self.is_stopped or asked:
            status = asked.status if asked else Status.interrupted
            write_status(paths, status, step=len(rows), reason=asked and asked.reason)
            return Ended(Status.interrupted)
        if self.world.fails(self.job):
            write_status(paths, Status.failed, step=len(rows), reason="out of memory")
            return Ended(Status.failed, "exit code 1")
        for _ in range(self.world.steps_at_once):
            rows.append(json.dumps({"step": len(rows) + 1, "loss": self.world.loss(self.job)}))
        write_text(paths.metrics, "\n".join(rows) + "\n")
        if len(rows) < (self.job.config.train.max_steps or 0):
            return None
        write_status(paths, Status.finished, step=len(rows))
        return Ended(Status.finished)

    def stop(self) -> None:
        self.is_stopped = True


def loss_by_rate(job: Job) -> float:
    """Best in the middle of the logarithmic scale."""
    return abs(math.log10(job.config.optimizer.lr) + 4.5)


@dataclass
class World:
    """A launcher that writes what runs would write; `started` are the names of all it started."""

    killed_at: int | None = None
    loss: Callable[[Job], float] = loss_by_rate
    fails: Callable[[Job], bool] = lambda job: False
    started: list[str] = field(default_factory=list)
    steps_at_once: int = 1
    was_left: bool = False
    looks_to_start: int = 0
    looks: int = 0
    parallel: int | None = 1
    takes_all = False
    poll_s: float = 0.001
    outlives_driver = False
    detach: bool = False
    _runs: list[Run] = field(default_factory=list)

    def problems(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        return []

    def describe(self, jobs: Sequence[Job], max_parallel: int | None) -> str:
        return "\n".join(f"would start {job.name}" for job in jobs)

    def start(self, jobs: Sequence[Job], max_parallel: int | None) -> Sequence[Run]:
        for job in jobs:
            job.paths.root.mkdir(parents=True, exist_ok=True)
            self.started.append(job.name)
        return [Run(job, self) for job in jobs]

    def attach(self, job: Job, launch: Mapping[str, Any]) -> Run | None:
        if not self.was_left:
            return None
        self.was_left = False
        return Run(job, self, is_stopped=True)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing is left behind."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # half a second each time
    monkeypatch.setattr("sdx_launchers.runs.summary.draw_curves", lambda table: None)


@cache
def base() -> Config:
    return compose([f"train.max_steps={STEPS}", "export.at_end=false"])


def composed(batches: Sequence[Sequence[str]]) -> list[SweptJob]:
    """As `SweepRequest.compose`, of keys of numbers and the optimizer alone, without Hydra."""
    jobs = []
    for overrides in batches:
        config = base()
        for text in overrides:
            override = parse(text)
            assert isinstance(override, Override)
            group, _, name = override.key_or_group.partition(".")
            value = override.value()
            new = value if name else OptimizerKind[str(value)]
            inner = replace(getattr(config, group), **{name or "kind": new})
            config = replace(config, **{group: inner})
        jobs.append(SweptJob(config, list(overrides)))
    names = folder_names([job.config for job in jobs], [job.overrides for job in jobs])
    return [
        SweptJob(replace(job.config, run=replace(job.config.run, name=name)), job.overrides)
        for job, name in zip(jobs, names, strict=True)
    ]


def run(world: World, *typed: str, **settings: Any) -> int:
    chosen = {"objective": "loss", "name": "s", "n_trials": 4, "pruner": Pruner.none} | settings
    request = SweepRequest("train", list(typed or [LR]), [], composed)
    return search(request, SearchSettings(**chosen), "sdx_local", world)


def journal() -> list[dict[str, Any]]:
    """Of every trial: values, state, and what it came to."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = str(Path("outputs/sweeps/s/journal.log"))
    storage = JournalStorage(JournalFileBackend(path))
    study = optuna.load_study(study_name="search", storage=storage)
    return [
        {"state": t.state.name, "value": t.value, "params": t.params, "told": t.intermediate_values}
        for t in study.trials
    ]


def states() -> list[str]:
    return [trial["state"] for trial in journal()]


def test_trials_run_to_their_end_and_the_best_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    assert run(world) == 0
    trials = journal()
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 4
    for trial in trials:
        rate = trial["params"]["optimizer.lr"]
        assert trial["value"] == pytest.approx(abs(math.log10(rate) + 4.5))
        assert sorted(trial["told"]) == list(range(1, STEPS + 1))
    best = min(range(4), key=lambda number: trials[number]["value"])
    said = capsys.readouterr().out
    assert f"best: trial {best}, loss {trials[best]['value']:.6g}, optimizer.lr=" in said
    manifest = json.loads(Path("outputs/sweeps/s/sweep.json").read_text())
    assert [job["name"] for job in manifest["jobs"]] == world.started
    summary = json.loads(Path("outputs/sweeps/s/summary.json").read_text())
    assert summary["best"] == world.started[best] and len(summary["runs"]) == 4
    assert run(world) == 0 and len(world.started) == 4  # all done: nothing is started
    assert run(world, n_trials=6) == 0 and len(world.started) == 6  # n_trials is the total


def test_a_bad_trial_is_asked_to_stop_and_is_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(loss=lambda job: 9.0 if job.name in world.started[3:4] else 1.0)
    assert run(world, n_trials=5, pruner=Pruner.median, n_startup_trials=2) == 0
    trials = journal()
    assert [trial["state"] for trial in trials] == ["COMPLETE"] * 3 + ["PRUNED", "COMPLETE"]
    assert len(trials[3]["told"]) < STEPS
    status = json.loads(Path("outputs", world.started[3], "status.json").read_text())
    assert status["status"] == "pruned" and status["reason"] == "loss 9 at step 1 is worse"
    assert "best: trial" in capsys.readouterr().out


def test_steps_that_no_other_trial_has_are_judged_by_those_before() -> None:
    world = World(loss=lambda job: job.config.optimizer.lr, steps_at_once=20)
    values = ("optimizer.lr=1e-5,1e-3", "train.max_steps=20,600")
    zipped = {"zip": ["optimizer.lr+train.max_steps"], "sampler": SearchSampler.random}
    assert run(world, *values, **zipped, pruner=Pruner.median, n_startup_trials=1, seed=4) == 0
    assert states()[0] == "COMPLETE" and set(states()) == {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize("killed_at", [1, 5, STEPS, STEPS + 1, 2 * STEPS + 3])
def test_a_search_killed_anywhere_goes_on_with_the_same_runs(killed_at: int) -> None:
    whole = World()
    assert run(whole, name="whole") == 0
    names = [*whole.started]
    for name in (*names, "launches"):  # the second search makes its own
        shutil.rmtree(Path("outputs", name))
    world = World(killed_at=killed_at)
    with pytest.raises(Killed):
        run(world)
    before = len(world.started)
    world.killed_at = None
    assert run(world) == 0
    assert states() == ["COMPLETE"] * 4
    assert list(dict.fromkeys(world.started)) == names
    assert len(world.started) - before == 4 - (before - 1)  # what ran then is started once more


def test_a_run_that_a_killed_search_left_saving_is_waited_for_and_started_again() -> None:
    world = World(killed_at=3)
    with pytest.raises(Killed):
        run(world)
    [name] = world.started
    write_launch(Path("outputs/launches", name))
    world.killed_at, world.was_left = None, True
    assert run(world) == 0
    assert world.started[:2] == [name, name] and states() == ["COMPLETE"] * 4


def test_a_run_asked_to_stop_before_it_started_again_is_asked_once_more() -> None:
    world = World(loss=lambda job: job.config.optimizer.lr, killed_at=24)
    values = ("optimizer.lr=1e-5,1e-3", "train.max_steps=20,600")
    settings = {"zip": ["optimizer.lr+train.max_steps"], "sampler": SearchSampler.random,
                "pruner": Pruner.none, "seed": 4, "n_trials": 2}  # fmt: skip
    with pytest.raises(Killed):
        run(world, *values, **settings)
    assert states() == ["COMPLETE", "RUNNING"]
    assert len(journal()[1]["told"]) < 6  # more than the killed search heard of:
    metrics = Path("outputs", world.started[1], "metrics.jsonl")
    metrics.write_text("".join(f'{{"step": {n}, "loss": 0.001}}\n' for n in range(1, 7)))
    world.killed_at, world.looks_to_start = None, 3
    settings |= {"pruner": Pruner.median, "n_startup_trials": 1}
    assert run(world, *values, **settings) == 0
    assert states() == ["COMPLETE", "PRUNED"]


def write_launch(folder: Path) -> None:
    """As the launcher of the killed search did."""
    (folder / "launch.json").write_text(json.dumps({"launcher": "sdx_local", "id": "1"}))


def test_seeds_repeat_and_differ() -> None:
    worlds = [World(), World(), World()]
    assert run(worlds[0], name="a", sampler=SearchSampler.random) == 0
    assert run(worlds[1], name="b", sampler=SearchSampler.random) == 0
    assert run(worlds[2], name="c", sampler=SearchSampler.random, seed=1) == 0
    assert not worlds[1].started  # the same runs, found finished
    assert not set(worlds[0].started) & set(worlds[2].started)


def test_room_is_filled_as_soon_as_a_trial_ends() -> None:
    at_once: list[int] = []

    def loss(job: Job) -> float:
        open_trials = [trial for trial in journal() if trial["state"] == "RUNNING"]
        at_once.append(len(open_trials))
        return loss_by_rate(job)

    world = World(loss=loss)
    assert run(world, n_trials=5, max_parallel=2) == 0
    assert max(at_once) == 2 and states() == ["COMPLETE"] * 5


def test_a_failed_trial_stops_no_other_and_is_tried_again_on_request() -> None:
    world = World(fails=lambda job: job.name in world.started[1:2])
    assert run(world) == 1
    assert states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert run(world) == 1 and len(world.started) == 4
    world.fails = lambda job: False
    assert run(world, retry_failed=True) == 0
    assert world.started[4] == world.started[1] and len(world.started) == 5
    assert states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert run(world, fail_fast=True) == 0


def test_fail_fast_stops_the_others() -> None:
    world = World(fails=lambda job: job.name in world.started[1:2])
    assert run(world, max_parallel=2, fail_fast=True) == 1
    assert sorted(states()) == ["FAIL", "RUNNING"]
    world.fails = lambda job: False
    assert run(world, max_parallel=2, retry_failed=True) == 0
    assert states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_values_that_come_up_twice_are_run_once() -> None:
    world = World()
    assert run(world, "optimizer.lr=1e-5,1e-3", n_trials=6, max_parallel=3) == 0
    assert sorted(world.started) == sorted(set(world.started)) and len(world.started) == 2
    trials = journal()
    assert len(trials) == 6 and len({trial["value"] for trial in trials}) == 2


def test_trials_that_are_the_same_run_but_for_its_speed_have_folders_of_their_own() -> None:
    world = World(loss=lambda job: float(job.config.data.num_workers or 0))
    assert run(world, "data.num_workers=interval(1,50)", n_trials=3) == 0
    assert len(set(world.started)) == 3 and len({trial["value"] for trial in journal()}) == 3
    assert run(world, "data.num_workers=interval(1,50)", n_trials=3) == 0
    assert len(world.started) == 3


def test_keys_of_a_grid_are_searched_beside_intervals() -> None:
    world = World()
    assert run(world, LR, "optimizer=adamw,lion", "run.seed=3", n_trials=8) == 0
    assert "seed: 3" in Path("outputs/launches", world.started[0], "config.yaml").read_text()
    kinds = {trial["params"]["optimizer"] for trial in journal()}
    assert kinds == {"adamw", "lion"}


@pytest.mark.parametrize(
    ("typed", "settings", "said"),
    [
        (["optimizer.b1=interval(0.5,1.5)"], {}, ["optimizer.b1", "1.5", "cannot run"]),
        (["optimizer.lrr=interval(1,2)"], {}, ["did you mean optimizer.lr", "cannot run"]),
        ([LR], {"objective": "validation_loss", "eval": None}, ["eval.every"]),
        ([LR], {"objective": "loss:least"}, ["loss:least"]),
        ([LR, "optimizer.b1=interval(2,1)"], {"name": "a b"}, ["lower end first", "a b"]),
        (["run.seed=1"], {}, ["nothing is searched"]),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_touched(
    typed: list[str], settings: dict[str, Any], said: list[str]
) -> None:
    more = ["eval.every=null"] if "eval" in settings else []
    settings = {key: value for key, value in settings.items() if key != "eval"}
    words = ["--multirun", "hydra/sweeper=sdx_search", *typed, *more]
    with pytest.raises(ConfigError) as caught:
        request = read_request("train", parse_arguments(words))
        assert isinstance(request, SweepRequest)
        search(request, SearchSettings(**settings), "sdx_local", World())
    assert all(words in str(caught.value) for words in said), str(caught.value)
    assert not Path("outputs").exists()


def test_a_place_must_wait_and_say_how_many_at_a_time() -> None:
    with pytest.raises(ConfigError, match="max_parallel"):
        run(World(parallel=None))
    with pytest.raises(ConfigError, match="detach"):
        run(World(detach=True))


def test_a_run_that_never_measured_the_objective_has_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(World(), objective="adherence:max", n_trials=1) == 1
    assert states() == ["FAIL"] and "adherence was never measured" in capsys.readouterr().out


def test_a_dry_run_shows_the_first_trials_and_touches_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World()
    assert run(world, dry_run=True, max_parallel=2) == 0
    said = capsys.readouterr().out
    assert "numbers from 1e-6 to 0.001, logarithmic" in said and said.count("would start") == 2
    assert not Path("outputs").exists()
    assert run(world) == 0
    assert f"would start {world.started[0]}" in said and f"-> {world.started[0]}" in said


def test_a_sweep_has_the_name_of_its_space_not_of_its_limits() -> None:
    run(World(), name=None, n_trials=1)
    run(World(), name=None, n_trials=2)
    assert len(list(Path("outputs/sweeps").iterdir())) == 1
    run(World(), name=None, n_trials=1, seed=1)
    assert len(list(Path("outputs/sweeps").iterdir())) == 2
