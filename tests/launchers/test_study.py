"""What a search may choose, how it is typed, and what it remembers when it is cut off."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sdx.config.errors import ConfigError, Problem
from sdx.config.launching import Pruner, SearchSampler, SearchSettings
from sdx_launchers.search.driver import _exit_code
from sdx_launchers.search.space import Choices, Numbers, Space, read_space
from sdx_launchers.search.study import Study, Trial
from sdx_launchers.sweep.objective import Objective

pytestmark = pytest.mark.fast

LOSS = Objective("loss")
SPACE = [
    "model=tiny",
    "optimizer.lr=tag(log,interval(1e-6,1e-3))",
    "lr_schedule.warmup_steps=interval(10,500)",
    "optimizer=adamw,lion",
]


def space_of(*typed: str, zipped: Sequence[str] = ()) -> Space:
    space, problems = read_space({}, typed, zipped)
    assert not problems, problems
    return space


def problems_of(*typed: str) -> list[Problem]:
    return read_space({}, typed, ())[1]


def open_study(journal: Path | None, **settings: object) -> Study:
    return Study(journal, space_of(*SPACE), SearchSettings(**settings), LOSS)  # type: ignore[arg-type]


def answer(study: Study, number: int) -> list[dict[str, object]]:
    """The values of so many trials, each answered by a loss that follows from them."""
    asked = []
    for _ in range(number):
        trial = study.ask()
        asked.append(trial.values)
        trial.complete(abs(math.log10(float(trial.values["optimizer.lr"])) + 4.5))
    return asked


def test_every_way_to_type_a_space() -> None:
    space = space_of(
        *SPACE,
        "optimizer.b1=interval(0,1)",
        "train.max_steps=range(100,301,100)",
        "train.ema_decay=range(0.1,0.35,0.1)",
        "data.captions=[a,b],[c]",
        "sampler=glob(d*)",
        "run.seed=tag(log,interval(1,1000))",
    )
    assert space.fixed == ("model=tiny",)
    by_name = {axis.name: axis for axis in space.axes}
    assert by_name["optimizer.lr"] == Numbers("optimizer.lr", 1e-6, 1e-3, None, True, False)
    warmup = Numbers("lr_schedule.warmup_steps", 10, 500, 1, False, True)
    assert by_name["lr_schedule.warmup_steps"] == warmup
    assert isinstance(by_name["optimizer.b1"].ends[1], float)  # whole ends, a key of any numbers
    assert by_name["train.max_steps"] == Numbers("train.max_steps", 100, 300, 100, False, True)
    decay = by_name["train.ema_decay"]
    assert decay == Numbers("train.ema_decay", 0.1, 0.3, 0.1, False, False)  # as a grid visits them
    assert by_name["run.seed"] == Numbers("run.seed", 1, 1000, 1, True, True)
    assert by_name["optimizer"].ends == ("adamw", "lion")
    assert {"ddim"} < set(by_name["sampler"].ends) and "euler" not in by_name["sampler"].ends
    assert space.overrides(
        {axis.name: axis.ends[0] for axis in space.axes}
    ) == [
        "model=tiny", "optimizer.lr=1e-06", "lr_schedule.warmup_steps=10", "optimizer=adamw",
        "optimizer.b1=0.0", "train.max_steps=100", "train.ema_decay=0.1", "data.captions=[a,b]",
        f"sampler={by_name['sampler'].ends[0]}", "run.seed=1",
    ]  # fmt: skip


def test_typed_values_replace_those_of_a_named_sweep_and_tied_keys_change_together() -> None:
    params = {"optimizer.lr": "interval(1,2)", "run.seed": "1,2", "train.max_steps": "3,4"}
    typed = ["optimizer.lr=1e-4", "run.seed=5,6"]
    space, problems = read_space(params, typed, ["run.seed+train.max_steps"])
    assert not problems and space.fixed == ("optimizer.lr=1e-4",)
    assert [list(axis.ends) for axis in space.axes] == [
        ["run.seed=5 train.max_steps=3", "run.seed=6 train.max_steps=4"]
    ] or [list(axis.ends) for axis in space.axes] == [
        ["train.max_steps=3 run.seed=5", "train.max_steps=4 run.seed=6"]
    ]
    [axis] = space.axes
    assert isinstance(axis, Choices) and len(axis.overrides(axis.ends[1])) == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("optimizer.lr=tag(lgo,interval(1,2))", "the only tag is log"),
        ("optimizer.lr=interval(2,1)", "lower end first"),
        ("optimizer.lr=tag(log,interval(0,1))", "begin above 0"),
        ("train.max_steps=interval(1.5,3)", "no whole numbers"),
        ("run.name=interval(1,2)", "list its values"),
        ("optimizer=interval(1,2)", "list its values"),
        ("train.max_steps=tag(log,range(1,9,2))", "interval(LOW,HIGH)"),
        ("model=glob(sdd*)", "there are"),
        ("train.max_steps=range(3,3)", "leaves nothing to choose"),
        ("run.seed=3", "nothing is searched"),
        ("optimizer.lr=interval(1,", "optimizer.lr"),
    ],
)
def test_spaces_that_make_no_sense(typed: str, said: str) -> None:
    [problem] = problems_of(typed)
    assert said in str(problem)


def test_all_faults_of_a_space_are_told_at_once() -> None:
    assert len(problems_of("optimizer.lr=interval(2,1)", "run.seed=interval(0.5,1)")) == 2


def test_corners_are_every_combination_or_every_axis() -> None:
    few = list(space_of("run.seed=1,2", "optimizer.lr=interval(1,2)").corners())
    assert len(few) == len({tuple(corner) for corner in few}) == 4
    keys = ["optimizer.lr", "optimizer.b1", "optimizer.b2", "optimizer.eps",
            "optimizer.weight_decay", "optimizer.max_grad_norm", "train.ema_decay"]  # fmt: skip
    many = list(space_of(*(f"{key}=interval(1,2)" for key in keys)).corners())
    assert len(many) == len({tuple(corner) for corner in many}) == 8
    assert {text for corner in many for text in corner} == {
        f"{key}={end}" for key in keys for end in (1.0, 2.0)
    }


@pytest.mark.parametrize("sampler", SearchSampler)
def test_seeds_repeat_however_often_the_search_was_cut_off(
    sampler: SearchSampler, tmp_path: Path
) -> None:
    whole = answer(open_study(tmp_path / "whole", sampler=sampler), 12)
    parts: list[dict[str, object]] = []
    for number in (5, 1, 6):
        parts += answer(open_study(tmp_path / "parts", sampler=sampler), number)
    assert parts == whole and len({str(values) for values in whole}) == 12
    other = answer(open_study(None, sampler=sampler, seed=1), 12)
    assert not [values for values in other if values in whole]
    rates = [float(str(values["optimizer.lr"])) for values in whole]
    assert min(rates) < 1e-4 and all(1e-6 <= rate <= 1e-3 for rate in rates)  # log: half below 3e-5


def test_trials_that_were_running_are_gone_on_with(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal")
    answer(study, 2)
    asked = study.ask()
    asked.note_run("run-1")
    asked.report(5, 0.5)
    with open(tmp_path / "journal", "ab") as file:
        file.write(b'{"op_code": 4, "wor')  # a kill in the middle of a line
    study = open_study(tmp_path / "journal")
    [again] = study.running()
    assert (again.number, again.values, again.run) == (2, asked.values, "run-1")
    again.report(5, 0.7)  # told before: the first stands
    again.report(6, None)
    again.complete(0.4)
    assert study.num_trials == study.num_complete == 3 and not study.running()
    frozen = open_study(tmp_path / "journal").frozen(2)
    assert frozen.value == 0.4 and frozen.intermediate_values[5] == 0.5
    assert frozen.intermediate_values[6] == math.inf


def test_failed_trials_are_tried_again_with_their_values_and_count_once(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal")
    answer(study, 1)
    bad = study.ask()
    bad.fail()
    assert study.num_trials == 2
    study.retry_failed()
    study.retry_failed()
    assert study.num_trials == 1
    again = study.ask()
    assert again.values == bad.values and again.number == 2 and study.num_trials == 2
    again.complete(0.1)
    assert study.counts() == {"complete": 2}
    best = study.best()
    assert best is not None and best[:2] == (2, 0.1)


def test_a_cancelled_trial_is_no_failed_one(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal", n_trials=1)
    study.ask().cancel()
    assert study.counts() == {"cancelled": 1} and _exit_code(study) == 75
    study = open_study(tmp_path / "journal", n_trials=1)
    assert study.counts() == {"cancelled": 1}
    study.retry_failed()
    study.ask().fail()
    assert study.counts() == {"fail": 1} and _exit_code(study) == 1


def test_a_kill_while_a_journal_is_mended_loses_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    answer(open_study(journal), 2)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)  # what empties a file first
    assert open_study(journal).num_trials == 2 and journal.read_bytes().startswith(whole)


def pruned(study: Study, trial: Trial, losses: Sequence[float]) -> int | None:
    """The step after which the trial is pruned."""
    for step, loss in enumerate(losses, start=1):
        trial.report(step, loss)
        if trial.should_prune():
            trial.prune()
            return step
    trial.complete(losses[-1])
    return None


@pytest.mark.parametrize(
    ("pruner", "warmup", "step"),
    [
        (Pruner.none, 0, None),
        (Pruner.median, 0, 1),
        (Pruner.median, 3, 3),
        (Pruner.hyperband, 1, 1),
    ],
)
def test_a_bad_trial_is_pruned_after_warming_up(
    pruner: Pruner, warmup: int, step: int | None
) -> None:
    study = open_study(None, pruner=pruner, pruning_warmup_steps=warmup, n_startup_trials=3)
    good, bad = [1.0, 0.9, 0.8, 0.7], [3.0, 3.0, 3.0, 3.0]
    assert [pruned(study, study.ask(), bad) for _ in range(2)] == [None, None]  # nothing to go by
    for _ in range(7):
        pruned(study, study.ask(), good)
    steps = [pruned(study, study.ask(), bad) for _ in range(6)]
    assert step in steps  # hyperband judges some of its trials later
    assert pruner is Pruner.hyperband or set(steps) == {step}


def test_a_diverged_trial_is_pruned(tmp_path: Path) -> None:
    study = open_study(tmp_path / "journal", n_startup_trials=1)
    pruned(study, study.ask(), [1.0, 1.0])
    trial = study.ask()
    trial.report(1, None)
    assert trial.should_prune()


def test_a_search_of_another_space_needs_another_name(tmp_path: Path) -> None:
    journal = tmp_path / "mine" / "journal"
    journal.parent.mkdir()
    answer(open_study(journal), 1)
    with pytest.raises(ConfigError, match="mine.*another space.*use another name"):
        Study(journal, space_of("run.seed=1,2"), SearchSettings(), LOSS)
    with pytest.raises(ConfigError, match="another objective"):
        Study(journal, space_of(*SPACE), SearchSettings(), Objective("loss", is_max=True))


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'sdx\[search\]'"):
        open_study(None)
