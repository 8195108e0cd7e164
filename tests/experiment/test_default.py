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
    """Five on two cores are 600 CPU-seconds, which other work on the machine does not change."""
    assert default_run[2] <= 420


def test_everything_is_there(default_run: tuple[Path, str, float]) -> None:
    run = default_run[0]
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    files = ("config.yaml", "run.json", "metrics.jsonl", "loss.png", "log.txt")
    for name in (*files, "export/model_index.json", "export/samples.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir()) and list((run / "samples").glob("*.png"))


def test_second_start_takes_its_first_step_soon(default_run: tuple[Path, str, float]) -> None:
    """With compiled programs at hand, from typing the command to the first row of metrics.

    On a busy machine the seconds that its processor gave to it count.
    """
    run = default_run[0]
    cache = f"run.compilation_cache_dir={run.parents[1] / 'cache'}"
    started = time.monotonic()
    overrides = [cache, "run.name=again", "metrics.every=1"]
    process = subprocess.Popen([sys.executable, "-m", "sdx.train", *overrides], cwd=run.parents[1])
    metrics = run.parent / "again" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    elapsed = time.monotonic() - started
    seconds = min(elapsed, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    process.kill()
    process.wait()
    assert metrics.stat().st_size and seconds < 10
