"""The table of runs: which keys, how each stands, what it was judged by, and what is damaged."""

import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from sdx.record.files import read_json, write_json
from sdx.record.lock import RunLock
from sdx.record.owner import this_process
from sdx.record.status import Status
from sdx_launchers.jobs import Ended
from sdx_launchers.launch_record import write_outcome
from sdx_launchers.runs.differences import differing_keys, short_names, value_of
from sdx_launchers.runs.found import find
from sdx_launchers.runs.table import RunsTable, duration, print_table, render, tabulate
from sdx_launchers.sweep.objective import Objective, parse_objective
from tests.launchers.made_runs import launched, make_job, make_run, make_sweep

pytestmark = pytest.mark.fast


def table_of(folder: Path, objective: Objective | None = None) -> RunsTable:
    return tabulate(find(folder), objective)


def shown(table: RunsTable, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The cells of each line of the table, without a terminal."""
    print_table(table, Console())
    lines = capsys.readouterr().out.splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines if line.strip()]


def test_only_what_differs_is_shown_in_the_order_of_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"b": 1e-5, "a": 5e-6}
    for name, lr in values.items():
        make_run(
            tmp_path,
            name,
            config={"optimizer.lr": lr},
            overrides=[f"optimizer.lr={lr}", "train.max_steps=4"],
            validation={2: 0.4, 4: 0.3 if name == "a" else None},
        )
    jobs = {name: [f"optimizer.lr={lr}", "train.max_steps=4"] for name, lr in values.items()}
    folder = make_sweep(tmp_path, jobs)
    head, *rows = shown(table_of(folder), capsys)
    assert head == ["run", "lr", "status", "step", "last", "best", "time", "starts", "where"]
    assert rows[0] == ["b", "1e-5", "finished", "4/4", "nan", "0.4 @2", "1m30s", "1", "node1"]
    assert rows[1] == ["*", "a", "5e-6", "finished", "4/4", "0.3", "0.3 @4", "1m30s", "1", "node1"]
    assert rows[2:] == [["Judged by validation_loss:min. Best: a."], ["2 runs: 2 finished."]]


def test_an_option_of_a_group_tells_all_that_follows_from_it(tmp_path: Path) -> None:
    sd21 = {"model.name": "sd21", "model.unet.sample_size": 96}
    make_run(tmp_path, "a", config=sd21, overrides=["model=sd21"])
    make_run(tmp_path, "b")
    make_run(tmp_path, "c", config={"optimizer.lr": 0.5})  # by --from, or another conf/
    table = table_of(tmp_path)
    assert table.keys == ["model", "optimizer.lr"]
    make_run(tmp_path, "d", config={"model.name": "sd15", "model.unet.sample_size": 64})
    assert differing_keys([run for run in table_of(tmp_path).runs if run.name in "bd"]) == [
        "model.name"
    ]


def test_keys_typed_together_are_both_shown(tmp_path: Path) -> None:
    for name, lr, size in (("a", 1.0, 2), ("b", 2.0, 4)):
        make_run(
            tmp_path,
            name,
            config={"optimizer.lr": lr, "train.max_steps": size},
            overrides=[f"+optimizer.lr={lr}", f"train.max_steps={size}", f"run.name={name}"],
        )
    assert table_of(tmp_path).keys == ["optimizer.lr", "train.max_steps"]


def test_jobs_that_have_not_begun_are_told_apart_by_what_was_typed(tmp_path: Path) -> None:
    typed = {"a": ["optimizer.lr=1e-3", "train.max_steps=4"], "b": ["optimizer.lr=0.5"]}
    typed["b"].append("train.max_steps=4.0")
    resolved = {"train.max_steps": None, "optimizer.lr": 0.001}
    make_run(tmp_path, "a", overrides=typed["a"], config=resolved)
    table = table_of(make_sweep(tmp_path, typed))
    assert table.keys == ["optimizer.lr"]
    assert [value_of(run, "optimizer.lr") for run in table.runs] == ["0.001", "0.5"]


def test_names_of_keys_are_as_short_as_they_can_be() -> None:
    keys = ["optimizer.lr", "data.seed", "run.seed", "model", "ema.model"]
    assert list(short_names(keys).values()) == [
        "lr", "data.seed", "run.seed", "model", "ema.model"
    ]  # fmt: skip


def test_a_run_that_says_it_runs_and_does_not_is_interrupted(tmp_path: Path) -> None:
    dead = make_run(tmp_path, "dead", status=Status.running)
    alive = make_run(tmp_path, "alive", status=Status.running, attempts=[("12:00:00", None)])
    write_json(dead.lock, {**asdict(this_process()), "process_started": 1})
    with RunLock(alive.lock):
        runs = {run.name: run for run in table_of(tmp_path).runs}
    assert {name: run.status for name, run in runs.items()} == {
        "dead": "interrupted", "alive": "running"
    }  # fmt: skip
    assert runs["alive"].wall_s is not None and runs["alive"].goes_on


def test_jobs_that_have_not_begun_are_told_by_their_launcher(tmp_path: Path) -> None:
    names = ["new", "queued", "cancelled", "again", "dead", "failed"]
    make_sweep(tmp_path, {name: [f"optimizer.lr={name}"] for name in names})
    jobs = {name: make_job(tmp_path, name) for name in names}
    launched(jobs["queued"])
    launched(jobs["cancelled"])
    write_outcome(jobs["cancelled"], Ended(Status.cancelled, "SLURM says CANCELLED"))
    make_run(tmp_path, "again", status=Status.failed, reason="of before")
    launched(jobs["again"], submitted="2126-01-01T00:00:00Z")
    gone = {**asdict(this_process()), "process_started": 1}
    launched(jobs["dead"], "sdx_local", process=gone)
    make_run(tmp_path, "failed", status=Status.failed, reason="RuntimeError: no")
    launched(jobs["failed"])
    runs = {run.name: run for run in table_of(tmp_path / "sweeps" / "lrs").runs}
    assert {name: run.status for name, run in runs.items()} == {
        "new": "new", "queued": "queued", "cancelled": "cancelled", "again": "queued",
        "dead": "new", "failed": "failed",
    }  # fmt: skip
    assert runs["cancelled"].reason == "SLURM says CANCELLED" and runs["again"].reason is None
    assert runs["queued"].where == "slurm 7" and runs["failed"].reason == "RuntimeError: no"


def test_an_outputs_folder_shows_jobs_that_wait_as_well(tmp_path: Path) -> None:
    make_run(tmp_path, "b-run")
    for folder in ("cache", "snapshots", "sweeps/x"):
        (tmp_path / folder).mkdir(parents=True)
    launched(make_job(tmp_path, "a-job"))
    elsewhere = make_job(tmp_path / "other", "of-another-folder")
    launched(elsewhere)
    elsewhere.folder.rename(tmp_path / "launches" / "of-another-folder")
    assert [run.name for run in table_of(tmp_path).runs] == ["b-run", "a-job"]
    assert [run.name for run in table_of(tmp_path / "b-run").runs] == ["b-run"]


def test_an_encoding_has_no_steps_and_no_metrics(tmp_path: Path) -> None:
    make_sweep(tmp_path, {"a": []})
    folder = tmp_path / "sweeps" / "lrs"
    manifest = read_json(folder / "sweep.json")
    write_json(folder / "sweep.json", {**(manifest or {}), "command": "encode"})
    job = make_job(tmp_path, "a")
    launched(job)
    (job.folder / "config.yaml").write_text("train: {max_steps: 900}\n")
    write_outcome(job, Ended(Status.finished))
    table = tabulate(find(folder))
    assert [(run.status, run.max_steps) for run in table.runs] == [("finished", None)]
    assert table.judged_by == "Encodings have no metrics."


def test_a_metric_that_nobody_has_is_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "a", losses=[0.5, 0.1, None])
    make_run(tmp_path, "b", losses=[0.5, 0.2, 0.4])
    table = table_of(tmp_path)
    assert table.judged_by == "No run has validation_loss: judged by loss:min instead."
    assert table.best is not None and table.best.name == "a"
    highest = table_of(tmp_path, Objective("loss", is_max=True))
    assert [highest.best_of(run) for run in highest.runs] == [(1, 0.5), (1, 0.5)]
    nothing = make_sweep(tmp_path, {"unborn": []})
    assert table_of(nothing).judged_by == "No run has a value of validation_loss yet."
    assert shown(table_of(nothing), capsys)[1] == ["unborn", "new"]


@pytest.mark.parametrize("text", ["", ":min", "loss:best", "loss:min:max"])
def test_an_objective_that_is_none(text: str) -> None:
    assert "METRIC" in str(parse_objective(text))


def test_time_counts_every_start(tmp_path: Path) -> None:
    spans = [("12:00:00", "12:01:00"), ("13:00:00", "13:00:07")]
    make_run(tmp_path, "a", attempts=spans)
    [run] = table_of(tmp_path).runs
    assert run.wall_s == 67 and len(run.attempts) == 2
    assert [duration(s) for s in (None, 9.4, 67, 3600 + 180)] == ["", "9s", "1m07s", "1h03m"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = [
    "status.json",
    "run.json",
    "metrics.jsonl",
    "attempts/1.json",
    "../launches/a/launch.json",
]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_said_in_its_row_and_breaks_no_other(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("a", "b"):
        make_run(tmp_path, run, validation={4: 0.3}, overrides=[f"optimizer.lr={run}"])
        launched(make_job(tmp_path, run))
    damaged = tmp_path / "a" / name
    if name == "metrics.jsonl":
        damaged.write_text('{"validation_loss": 0.1, "st\n' + damaged.read_text())
    else:
        _cut(damaged)
    table = table_of(tmp_path)
    lines = shown(table, capsys)
    assert lines[2][-7:-4] == ["finished", "4/4", "0.3"], lines
    assert any(line[0].startswith("a: ") and Path(name).name in line[0] for line in lines), lines
    assert table.best is not None
    [bad, good] = table.runs
    assert not good.faults and len(bad.faults) == 1
    assert (bad.status == "unreadable") == (name == "status.json")


@pytest.mark.parametrize("text", ['{"status": "sideways", "step": 1}', "[]", "{}", "\x00\xff"])
def test_any_content_of_a_status_is_survived(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, "a").status.write_text(text)
    [run] = table_of(tmp_path).runs
    assert run.status == "unreadable" and run.faults


def test_a_row_that_is_being_written_is_not_damage(tmp_path: Path) -> None:
    paths = make_run(tmp_path, "a", validation={3: 0.25})
    with open(paths.metrics, "a") as file:
        file.write('{"step": 4, "validation_lo')
    [run] = (table := table_of(tmp_path)).runs
    assert not run.faults and table.last_of(run) == (3, 0.25)


def test_a_narrow_terminal_gets_two_lines_a_run(tmp_path: Path) -> None:
    for name in ("a-rather-long-name-of-a-run-0a1b2c3d", "another-rather-long-name-4e5f6a7b"):
        make_run(tmp_path, name, overrides=[f"optimizer.lr={name[0]}"])
    table = table_of(tmp_path)
    wide = Console(width=200, force_terminal=True, color_system=None, record=True)
    narrow = Console(width=60, force_terminal=True, color_system=None, record=True)
    for console in (wide, narrow):
        with open(os.devnull, "w") as console.file:
            console.print(render(table, console))
    assert len(wide.export_text().splitlines()) == 1 + 2 + 2
    lines = narrow.export_text().splitlines()
    assert max(map(len, lines)) <= 60
    assert (
        "* a-rather-long-name-of-a-run-0a1b2c3d  finished" in lines[0] and "time 1m30s" in lines[1]
    )


def test_what_a_run_says_cannot_command_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "a", status=Status.failed, reason="\x1b]0;title\x07 [bold]no[/bold]\nmore")
    print_table(table_of(tmp_path), Console())
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\x07" not in text and "[bold]no[/bold] more" in text
