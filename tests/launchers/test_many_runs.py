"""Runs in an object store, and more of them than fit a screen."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdx.record.store import as_path
from sdx_launchers.runs.found import find
from sdx_launchers.runs.table import tabulate
from tests.launchers.made_runs import launched, make_job, make_run, make_sweep


def test_runs_in_a_store(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place: Any = as_path(f"{bucket}/runs")
    for name in ("a", "b"):
        make_run(place, name, validation={4: 0.3}, overrides=[f"optimizer.lr={name}"])
    waiting = make_job(tmp_path / "outputs", "c")
    launched(waiting)
    job = waiting.folder / "job.json"
    job.write_text(job.read_text().replace(str(waiting.paths.root), f"{place}/c"))
    table = tabulate(find(place))
    assert [(run.name, run.status) for run in table.runs] == [
        ("a", "finished"), ("b", "finished"), ("c", "queued")
    ]  # fmt: skip
    assert table.last_of(table.runs[0]) == (4, 0.3) and table.runs[0].wall_s == 90
    assert [run.name for run in tabulate(find(place / "a")).runs] == ["a"]


def test_two_hundred_runs_are_shown_without_jax(tmp_path: Path) -> None:
    names = {f"run{number}": [f"run.seed={number}"] for number in range(200)}
    first = make_run(tmp_path, "run0", validation={4: 0.3}, losses=[0.5] * 100).root
    for name in [*names][1:]:
        shutil.copytree(first, tmp_path / name)
    folder = make_sweep(tmp_path, names)
    script = (
        "import sys; from sdx.runs import main; code = main(sys.argv[1:]);"
        "assert 'jax' not in sys.modules and 'submitit' not in sys.modules; sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1 + 200 + 3
    assert (folder / "curves.png").is_file()
