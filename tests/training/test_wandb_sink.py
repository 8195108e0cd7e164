"""What W&B is told, offline: read back from the files that its client leaves in the run folder."""

import gc
import json
import os
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from wandb.proto import wandb_internal_pb2
from wandb.sdk.lib.module import unset_globals

from sdx.config.schema import Sink, WandbConfig
from sdx.record.files import write_json
from sdx.record.paths import RunPaths
from sdx.training import wandb_sink
from sdx.training.sinks import MetricSink, SinkError, Told, check_sinks, make_sinks
from sdx.training.wandb_sink import WandbSink
from tests.experiment.conftest import Command
from tests.experiment.test_resume import wait_for_step

BLOCK = 32768  # of LevelDB's log format, in which W&B keeps its records
Record: Any = vars(wandb_internal_pb2)["Record"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B as if just installed: no login, no network, nothing kept outside of the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    wandb.teardown()
    yield
    wandb.teardown()
    unset_globals()  # of runs that lost their service
    with warnings.catch_warnings():  # the client does not wait for the end of its service
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def told(run: Path) -> list[list[dict[str, Any]]]:
    """The rows of each start, by the names they have at W&B."""
    return [
        [
            {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
            for r in records(path)
            if r.WhichOneof("record_type") == "history"
        ]
        for path in files(run)
    ]


def files(run: Path) -> list[Path]:
    found = (run / "wandb").glob("offline-run-*/*.wandb")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def first(run: Path, kind: str, start: int = 0) -> Any:
    """The first record of that kind that a start left."""
    return next(
        getattr(r, kind) for r in records(files(run)[start]) if r.WhichOneof("record_type") == kind
    )


def make_sink(run: Path, said: list[str] | None = None, clock: Clock | None = None) -> WandbSink:
    return WandbSink(
        WandbConfig(project="birds", entity="flock"),
        folder=run,
        name=run.name,
        created="2026-11-22T00:00:00Z",
        config={"optimizer": {"lr": 1e-5}},
        tags=["small"],
        say=(said if said is not None else []).append,
        clock=clock or Clock(),
    )


def test_rows_and_pictures_of_two_starts_are_one_run(tmp_path: Path) -> None:
    run = tmp_path / "a run, of birds"
    picture = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    sink = make_sink(run)
    assert isinstance(sink, MetricSink)
    for step in (1, 2):
        sink.write(step, {"loss": step / 8})
    sink.picture(2, "samples", picture)
    sink.write(2, {"validation_loss": 0.5})
    sink.close(exit_code=75)
    again = make_sink(run)
    for step in (2, 3):  # step 2 was told
        again.write(step, {"loss": step / 8})
        again.picture(step, "samples", picture)
    again.close()
    before, after = told(run)
    assert [(row["_step"], row["loss"]) for row in before] == [(1, 0.125), (2, 0.25)]
    assert before[1]["validation_loss"] == 0.5
    assert (before[1]["samples/width"], before[1]["samples/height"]) == (6, 4)
    assert [(row["_step"], row["loss"]) for row in after] == [(3, 0.375)]
    kept = [path.parent / "files" / row["samples/path"] for path, row in
            zip(files(run), (before[1], after[0]), strict=True)]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in kept)
    one, other = first(run, "run"), first(run, "run", start=1)
    assert (one.project, one.entity, one.display_name) == ("birds", "flock", run.name)
    assert one.run_id == other.run_id and one.run_id.startswith("a_run__of_birds-")
    assert list(one.tags) == ["small"]
    config = {item.key: item.value_json for item in one.config.update}
    assert json.loads(config["optimizer"]) == {"lr": 1e-5}
    codes = [first(run, "exit", start).exit_code for start in (0, 1)]
    assert codes == [75, 0]
    assert not list(tmp_path.rglob("wandb-metadata.json")), "it holds arguments"


def test_what_a_kill_may_have_lost_is_told_again(tmp_path: Path) -> None:
    clock = Clock()
    killed = make_sink(tmp_path, clock=clock)
    for step in (1, 2, 3):
        killed.write(step, {"loss": 1.0})
        clock.now += 10
    killed.write(4, {"loss": 1.0})  # 1 and 2 were written 15 s ago or more
    wandb.teardown()
    again = make_sink(tmp_path)
    for step in (2, 3, 4):
        again.write(step, {"loss": 2.0})
    again.close()
    assert [row["_step"] for row in told(tmp_path)[1]] == [3, 4]


def test_a_service_that_dies_ends_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    sink = make_sink(tmp_path, said)
    sink.write(1, {"loss": 1.0})
    os.kill(service_of(os.getpid()), signal.SIGKILL)
    for step in range(2, 6):
        sink.write(step, {"loss": 1.0})
        sink.picture(step, "samples", np.zeros((2, 2, 3), np.uint8))
        if said:
            break
    sink.write(7, {"loss": 1.0})
    sink.close()
    (line,) = said
    assert line.startswith("W&B is told nothing more (") and "RUN/wandb" in line


def service_of(process: int) -> int:
    """The client's own process."""
    lines = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process)], capture_output=True, text=True
    ).stdout.splitlines()
    (line,) = [line for line in lines if "wandb-core" in line]
    return int(line.split()[0])


def test_without_an_answer_a_run_is_told_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "a" * 40,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        wandb_sink, "_SETTINGS", {**wandb_sink._SETTINGS, "init_timeout": 1, "gone": 1}
    )
    wandb.teardown()
    said: list[str] = []
    sink = make_sink(tmp_path, said)
    sink.write(1, {"loss": 1.0})
    sink.close()
    (line,) = said
    assert line.startswith("W&B does not answer (") and "`wandb sync`" in line
    assert [row["_step"] for row in told(tmp_path)[0]] == [1]


@pytest.mark.parametrize(
    ("environment", "keeps_files", "fault"),
    [
        ({"WANDB_MODE": "online"}, True, "W&B finds no login; run `wandb login`"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, True, "WANDB_API_KEY invalid"),
        ({"WANDB_MODE": "offline"}, False, "in an object store; use WANDB_MODE=online"),
        ({"WANDB_MODE": "offline"}, True, None),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "b" * 40}, False, None),
    ],
)
def test_what_is_missing_is_said_at_the_start(
    environment: dict[str, str],
    keeps_files: bool,
    fault: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    check_sinks([Sink.jsonl], keeps_files=keeps_files)
    kinds = [Sink.wandb, Sink.jsonl]
    if fault is None:
        check_sinks(kinds, keeps_files=keeps_files)
        return
    with pytest.raises(SinkError) as caught:
        check_sinks(kinds, keeps_files=keeps_files)
    assert str(caught.value).startswith("metrics.sinks=[wandb,jsonl]: ")
    assert fault in str(caught.value)


def test_a_missing_package_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sdx.training.wandb_sink")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SinkError, match=r"pip install 'sdx\[wandb\]'"):
        check_sinks([Sink.wandb], keeps_files=True)


def test_the_run_of_a_folder_is_told_what_the_sinks_know(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    write_json(paths.run, {"created": "2026-11-22T00:00:00Z"})
    (sink,) = make_sinks([Sink.wandb], Told(paths, first_step=1, config={"seed": 3}, tags=["x"]))
    sink.write(1, {"loss": 1.0})
    sink.close()
    run = first(paths.root, "run")
    assert run.run_id == wandb_sink.run_id("run", "2026-11-22T00:00:00Z")
    assert run.run_id != wandb_sink.run_id("run", "2026-11-22T00:00:01Z")
    assert run.project == "sdx" and list(run.tags) == ["x"]
    assert {item.key: item.value_json for item in run.config.update}["seed"] == "3"


def test_a_killed_and_a_stopped_run_is_one(tmp_path: Path) -> None:
    secret = "hf_" + "a1" * 15
    command = Command(tmp_path)
    overrides = (
        "train.max_steps=1000", "checkpoint.every=5", "run.name=run", "sample.every=null",
        "metrics.sinks=[wandb,jsonl]", f"run.tags=['my {secret}']",
    )  # fmt: skip
    run = command.path("run")
    process = command.start(*overrides)
    wait_for_step(process, run, 7)
    process.kill()
    process.communicate(timeout=600)
    process = command.start(*overrides)
    wait_for_step(process, run, 12)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    killed, stopped = told(run)
    assert len({path.name for path in files(run)}) == 1  # run-ID.wandb
    assert first(run, "exit", 1).exit_code == 75
    losses = {json.loads(line)["step"]: json.loads(line)["loss"]
              for line in (run / "metrics.jsonl").read_text().splitlines()}  # fmt: skip
    assert all(row["loss"] == losses[row["_step"]] for row in (*killed, *stopped))
    assert {row["_step"] for row in (*killed, *stopped)} == set(losses)
    config = {item.key: json.loads(item.value_json) for item in first(run, "run", 1).config.update}
    assert config["model"]["name"] == "tiny" and config["optimizer"]["kind"] == "adamw"
    assert not any(secret.encode() in path.read_bytes() for path in files(run))
