"""Sweeps as they are typed, with the real trainer: run, refused, killed, gone on with."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from sdx.train import main as train
from tests.experiment.conftest import Command
from tests.launchers.test_local import descendants, is_alive, num_rows, read, sweep, wait_until

PATIENCE_S = 1800  # for three jobs on a slow machine
SIZES = "data.num_examples=64,65,66"  # other runs, the same compiled programs
SHORT = ["sample.every=null", "eval.every=null", "hydra.launcher.poll_s=0.2"]

STAND_IN = """\
#!{python}
import json, os, pathlib, signal, sys, time

def end(status, code):
    said = dict(status=status, step=3, updated="2026-01-01T00:00:00Z", reason=None)
    (run / "draft").write_text(json.dumps(said))
    os.replace(run / "draft", run / "status.json")
    sys.exit(code)

run = pathlib.Path(json.loads(pathlib.Path(os.environ["SDX_JOB"]).read_text())["run"])
run.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda number, frame: end("interrupted", 75))
with open(run / "starts", "a") as file:
    file.write(f"{{os.getppid()}}\\n")
while not (run / "go").exists():
    time.sleep(0.02)
end("finished", 0)
"""
"""In place of the trainer: ends when it is told to, and keeps its status."""


def typed(folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of `python -m sdx.train --multirun` in that folder."""
    with sweep(folder, *SHORT, "train.max_steps=3", *overrides) as process:
        output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def summary(folder: Path) -> dict[str, Any]:
    [sweep] = (folder / "outputs" / "sweeps").iterdir()
    return json.loads((sweep / "summary.json").read_text())


def test_one_job_of_three_breaks_and_the_others_finish(tmp_path: Path) -> None:
    """Then the same command again, and once more when what was wrong is put right."""
    overrides = [SIZES, "run.name=three"]
    code, planned = typed(tmp_path, *overrides, "hydra.sweeper.dry_run=true")
    assert code == 0 and not (tmp_path / "outputs").exists(), planned
    names = [line.split()[-1] for line in planned.splitlines() if line[:1].isdigit()]
    assert len(names) == 3 and planned.count("/config.yaml") == 3, planned
    in_the_way = tmp_path / "outputs" / names[1] / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")  # where a folder must be
    code, output = typed(tmp_path, *overrides)
    assert code == 1, output
    states = [run["status"] for run in summary(tmp_path)["runs"]]
    assert states == ["finished", "failed", "finished"], output
    page = next(tmp_path.glob("outputs/sweeps/*/summary.md")).read_text()
    log = (tmp_path / "outputs" / "launches" / names[1] / "log.txt").read_text()
    for text in (page, log):
        assert "Traceback" in text and str(in_the_way) in text, text
    code, output = typed(tmp_path, *overrides)
    assert code == 1 and output.count("skipped") == 2, output
    assert "hydra.sweeper.retry_failed=true starts it again" in output
    assert "started, process" not in output
    in_the_way.unlink()
    code, output = typed(tmp_path, *overrides, "hydra.sweeper.retry_failed=true")
    assert code == 0 and output.count("started, process") == 1, output
    assert [run["status"] for run in summary(tmp_path)["runs"]] == 3 * ["finished"]


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    overrides = ["data.num_examples=64,65", "train.max_steps=40", "checkpoint.every=10"]
    with sweep(tmp_path, *SHORT, *overrides) as process:
        wait_until(
            lambda: any(num_rows(path.parent) > 2 for path in tmp_path.glob("outputs/*/run.json")),
            process,
        )
        family = descendants(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        [first] = [path.parent for path in tmp_path.glob("outputs/*/run.json")]
        code, output = typed(tmp_path, *overrides)  # at once: the job may still be saving
        wait_until(lambda: not any(is_alive(pid) for pid in family))
    assert code == 0, output
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    attempts = sorted(first.glob("attempts/*.json"))
    assert len(attempts) == 2 and read(attempts[1])["first_step"] > 0
    assert [run["starts"] for run in summary(tmp_path)["runs"]] == [2, 1]


def starts(run: Path) -> list[int]:
    """The sweeps that have started STAND_IN for that run, by their process."""
    path = run / "starts"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_of_two_sweeps_runs_once_and_is_taken_over_where_one_is_stopped(
    tmp_path: Path,
) -> None:
    """The second sweep is typed when nothing of the shared job is on record."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    overrides = [*SHORT, "train.max_steps=3", f"hydra.launcher.python={stand_in}"]
    with sweep(tmp_path, *overrides, "run.seed=1,0") as second:
        wait_until(lambda: [*tmp_path.glob("outputs/*/starts")], second)
        [own] = [path.parent for path in tmp_path.glob("outputs/*/starts")]
        with sweep(tmp_path, *overrides, "run.seed=0") as first:
            wait_until(lambda: len([*tmp_path.glob("outputs/*/starts")]) == 2, first)
            [shared] = {path.parent for path in tmp_path.glob("outputs/*/starts")} - {own}
            (own / "go").touch()
            assert second.stdout is not None
            said = next(line for line in second.stdout if line.startswith("[2/2]"))
            assert f"{shared.name} was started elsewhere by the sweep" in said, said
            first.send_signal(signal.SIGINT)
            output, _ = first.communicate(timeout=PATIENCE_S)
        assert first.returncode == 75, output
        wait_until(lambda: len(starts(shared)) == 2, second)
        (shared / "go").touch()
        output = second.stdout.read()
        assert second.wait() == 0, output
    assert starts(shared) == [first.pid, second.pid] and starts(own) == [second.pid]
    assert "was stopped where it ran: this sweep goes on with it" in output


def test_faults_of_all_jobs_are_listed_and_nothing_is_started(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = ["--multirun", "train.max_steps=3,0", "optimizer.lr=1e-5,-1"]
    assert train(bad) == 2
    said = capsys.readouterr().err
    assert "train.max_steps=0: must be at least 1" in said and "optimizer.lr=-1" in said
    assert "nothing was started" in said and list(tmp_path.iterdir()) == []


def test_hydras_own_sweeper_runs_jobs_by_our_launcher(tmp_path: Path) -> None:
    code, output = typed(tmp_path, "hydra/sweeper=basic", "data.num_examples=64")
    assert code == 0, output
    [run] = summary(tmp_path)["runs"]
    assert (run["status"], run["step"]) == ("finished", 3)
    code, output = typed(tmp_path, "hydra/sweeper=basic", "data.num_examples=64")
    assert code == 0 and "skipped" in output


def test_a_named_sweep_of_encodings(tmp_path: Path) -> None:
    option = tmp_path / "conf" / "sweep" / "sizes.yaml"
    option.parent.mkdir(parents=True)
    option.write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      data.num_examples: 16\n"
    )
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    arguments = ["sweep=sizes", cache, "hydra.launcher.poll_s=0.2"]
    for _ in range(2):  # the second one finds by itself that all is done
        code, output = Command(tmp_path).run(*arguments, command="encode")
        assert code == 0 and "complete" in output, output
