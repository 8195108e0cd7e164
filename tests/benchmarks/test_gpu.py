"""The GPU benchmark runs from end to end where there is no GPU, and whatever goes wrong on one is a
row of its table."""

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdx.config.check import check
from sdx.config.compose import compose
from tests.benchmarks import gpu
from tests.benchmarks.gpu_task import Event, Task, answer_events
from tests.benchmarks.trace_shares import parts_of, seconds_by_part

QUICK = "--model tiny --platform cpu --windows 1 --steps 1 --seconds 3000".split()
X = jnp.full((256, 256), 1e-3)
SMALLER = ("model.unet.layers_per_block=1", "data.num_examples=64")


@pytest.fixture
def fewer_optimizations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled here is not timed for anybody."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(folder: Path, *arguments: str) -> tuple[int, list[Event]]:
    """Exit code, and the rows of the file."""
    file = folder / "rows.jsonl"
    places = ["--out", str(file), "--cache", os.environ["JAX_COMPILATION_CACHE_DIR"]]
    code = gpu.main([*QUICK, *places, *arguments, "--set", *SMALLER])
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def test_a_step_is_measured_once(
    tmp_path: Path, fewer_optimizations: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = run(tmp_path, "--batches", "2", "--sides", "sdx")
    assert code == 0 and len(rows) == 1, rows
    row = rows[0]
    assert row["status"] == "done" and row["donated"] and row["bad_steps"] == 0
    assert row["step_with_captions_s"] > 0 and sum(row["shares"].values()) == pytest.approx(1)
    assert {"attention", "convolution", "normalisation"} <= row["shares"].keys()
    assert f"{2 / row['step_s']:.1f}" in capsys.readouterr().out
    assert run(tmp_path, "--batches", "2", "--sides", "sdx") == (0, rows)  # nothing anew


@pytest.mark.release
def test_torch_takes_its_turn(tmp_path: Path, fewer_optimizations: None) -> None:
    code, rows = run(tmp_path, "--batches", "2,3")
    assert code == 0
    turns = [(row["side"], row["batch_size"], row["status"]) for row in rows]
    assert turns == [
        (s, b, "done") for s, b in (("sdx", 2), ("torch", 2), ("torch", 3), ("sdx", 3))
    ]


def test_what_has_no_time_or_breaks_is_a_row(tmp_path: Path) -> None:
    code, rows = run(tmp_path, "--batches", "2", "--seconds", "1.5")
    assert code == 1
    assert {row["status"] for row in rows} == {"out of time", "no time"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate", "out of memory"),
        ("no", "failed"),
    ],
)
def test_too_large_a_batch_is_a_row(
    text: str, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def events(task: Task) -> Iterator[Event]:
        yield {"compile_s": 1.0}
        raise RuntimeError(text)

    task = Task(overrides=[], batch_size=64, windows=1, steps=1, cache="")
    monkeypatch.setattr(sys, "argv", ["gpu_sdx", task.to_json()])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # it leaves its own behind
    answer_events(events)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0] == {"compile_s": 1.0}
    assert said[1]["status"] == status and text in said[1]["detail"]


@pytest.mark.fast
def test_what_is_absent_is_not_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def events(task: Task) -> Iterator[Event]:
        yield {"status": "absent", "detail": "no GPU"}

    task = Task(overrides=[], batch_size=64, windows=1, steps=1, cache="")
    monkeypatch.setattr(sys, "argv", ["gpu_torch", task.to_json()])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    answer_events(events)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "absent"


def test_without_a_gpu_a_side_is_asked_once_in_each_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = ("--platform", "gpu", "--batches", "2,3", "--sides", "sdx")
    for told in (1, 2):
        code, rows = run(tmp_path, *words)
        assert code == 1 and [row["status"] for row in rows] == ["absent"] * told, rows
    assert "sees no GPU" in capsys.readouterr().out


@pytest.mark.fast
@pytest.mark.parametrize("hardware", ["gpu_24gb_1", "gpu_a100_8", "gpu_h200_8"])
def test_one_gpu_of_any_preset_is_measured(hardware: str, tmp_path: Path) -> None:
    _, rows = run(tmp_path, "--platform", "gpu", "--hardware", hardware, "--seconds", "0")
    config = compose(rows[0]["overrides"])
    assert config.hardware.num_devices == 1 and check(config) == []


@pytest.mark.fast
def test_the_table() -> None:
    ours = {
        "side": "sdx", "batch_size": 32, "round": 0, "status": "done", "step_s": 0.2, "flags": {},
        "device": "NVIDIA H100 80GB HBM3", "software": "jax", "attention": {}, "compile_s": 100.0,
        "gflops_per_image": 2413.0, "peak_tflops": 989.4, "shares": {"attention": 0.25},
    }  # fmt: skip
    again = ours | {"round": 1, "step_s": 0.3}
    theirs = {"side": "torch", "batch_size": 32, "round": 0, "status": "done", "step_s": 0.4}
    full = {"side": "sdx", "batch_size": 64, "status": "out of memory", "detail": "needs 90 GiB"}
    text = gpu.table([ours, again, theirs, full])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:4]]
    assert cells[0][:6] == ["32", "128.0", "250.0", "31.2%", "", "25.0%"]
    assert cells[0][-2:] == ["80.0", "1.60"]
    assert cells[1][:2] == ["64", "out of memory"]
    assert "best 160.0 images/s = 1.18 of 135.9, goal 165" in text and "needs 90 GiB" in text


def test_a_trace_names_the_operations_of_the_program(tmp_path: Path) -> None:
    def work(x: jax.Array) -> jax.Array:
        with jax.named_scope("product"):
            x = jnp.tanh(x @ x)
        with jax.named_scope("attention"):
            return jnp.sum(x @ x)

    compiled = jax.jit(jax.grad(work)).lower(X).compile()
    jax.block_until_ready(compiled(X))
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(compiled(X))
    spent = seconds_by_part(tmp_path, parts_of(compiled.as_text() or ""))
    assert spent["attention"] > 0 and spent["product"] > 0 and "unknown" not in spent


@pytest.mark.fast
def test_streams_of_a_gpu_are_counted_once(tmp_path: Path) -> None:
    """By operation, by the operation in a kernel's name, or by what the name looks like."""
    rows = [("fusion.1", "fusion.1", 1), ("fusion_2", None, 2), ("cudnn_sdpa_fwd", None, 4),
            ("mystery", None, 8)]  # fmt: skip
    events: list[Any] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((1, "Stream #7(Compute)"), (2, "XLA Ops"))
    ]
    for tid in (1, 2):
        for name, operation, duration in rows:
            args = {} if operation is None else {"hlo_op": operation}
            times = {"ts": 0, "dur": duration * 1e6}
            events.append({"ph": "X", "pid": 1, "tid": tid, "name": name, "args": args, **times})
    text = json.dumps({"traceEvents": events}).encode()
    (tmp_path / "host.trace.json.gz").write_bytes(gzip.compress(text))
    spent = seconds_by_part(tmp_path, {"fusion.1": "normalisation", "fusion.2": "convolution"})
    assert spent == {"normalisation": 1, "convolution": 2, "attention": 4, "unknown": 8}
