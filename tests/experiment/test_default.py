"""The default run keeps its promise: minutes on a CPU, and the pictures are right."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest


def cpu_seconds() -> float:
    """What finished child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """Folder, output and CPU-seconds of `python -m sdx.train` with nothing compiled before."""
    folder = tmp_path_factory.mktemp("default")
    cache = f"run.compilation_cache_dir={folder / 'cache'}"
    used, started = cpu_seconds(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sdx.train", cache], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "outputs").iterdir()
    print(f"default run: {time.monotonic() - started:.0f} s, {cpu_seconds() - used:.0f} CPU-s")
    return run, done.stdout, cpu_seconds() - used


def test_pictures_show_what_unseen_prompts_say(default_run: tuple[Path, str, float]) -> None:
    run, output, _ = default_run
    said = re.search(r"^adherence: colour=([\d.]+) shape=([\d.]+)$", output, re.MULTILINE)
    assert said, output
    kept = json.loads((run / "run.json").read_text())["adherence"]
    assert kept["colour"] == pytest.approx(float(said[1]), abs=0.005)
    assert kept["shape"] == pytest.approx(float(said[2]), abs=0.005)
    assert kept["colour"] >= 0.90 and kept["shape"] >= 0.80


def test_it_takes_minutes(default_run: tuple[Path, str, float]) -> None:
    """Measured: 343 CPU-seconds, which other work on the machine hardly changes; a machine half as
    fast passes."""
    assert default_run[2] <= 1000


def test_everything_is_there(default_run: tuple[Path, str, float]) -> None:
    run = default_run[0]
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    files = ("config.yaml", "run.json", "metrics.jsonl", "loss.png", "log.txt")
    for name in (*files, "export/model_index.json", "export/samples.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir()) and list((run / "samples").glob("*.png"))


def test_second_start_takes_its_first_step_soon(default_run: tuple[Path, str, float]) -> None:
    """With compiled programs at hand, from typing the command to the first row of metrics.

    Measured: 10 CPU-seconds of the 343 of the whole run; 36 where programs are compiled.
    """
    run, _, whole = default_run
    cache = run.parents[1] / "cache"
    compiled = {path.name for path in cache.iterdir()}
    overrides = [f"run.compilation_cache_dir={cache}", "run.name=again", "metrics.every=1"]
    process = subprocess.Popen([sys.executable, "-m", "sdx.train", *overrides], cwd=run.parents[1])
    metrics = run.parent / "again" / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            time.sleep(0.02)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    finally:
        process.kill()
        process.wait()
    new = {path.name for path in cache.iterdir()} - compiled
    assert not [name for name in new if name.endswith("-cache")], "nothing was compiled again"
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    assert seconds < 0.07 * whole, (seconds, whole)
