"""Checkpoints in an object store: a step is there with its manifest, whatever a kill left."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdx.record import store
from sdx.record.scratch import scratch_folder
from sdx.record.store import ObjectPath, StoreError, as_path, upload
from sdx.training import process_parts, step_place
from sdx.training.checkpoint import Checkpointer, NoValidCheckpoint, restore_params
from tests.training.test_checkpoint import (
    ABSTRACT,
    REPOSITORY,
    STEPS,
    _assert_same,
    _say_nothing,
    _state,
)
from tests.training.test_checkpoint import saved as saved  # its fixture

Say = Callable[[str], None]


@pytest.fixture
def folder(bucket: str, saved: Path) -> ObjectPath:
    """The same checkpoints in a store; a local run's folder copied there is one."""
    folder = as_path(f"{bucket}/run/checkpoints")
    assert isinstance(folder, ObjectPath)
    upload(saved, folder)
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where local copies go; nothing is left there."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "scratch"


def restore(folder: ObjectPath, say: Say = _say_nothing) -> tuple[int, Any] | None:
    checkpointer = Checkpointer(folder, keep=2, say=say)
    try:
        return checkpointer.restore(ABSTRACT)
    finally:
        checkpointer.close()


def names(folder: ObjectPath) -> list[str]:
    return [path.name for path in folder.iterdir()]


def data_file(step: ObjectPath) -> str:
    """The largest, below `state/`."""
    return max(step.files().items(), key=lambda item: item[1])[0]


def test_steps_come_back_as_saved_and_old_ones_go(bucket: str, scratch: Path) -> None:
    folder = as_path(f"{bucket}/run/checkpoints")
    assert isinstance(folder, ObjectPath)
    assert restore(folder) is None
    checkpointer = Checkpointer(folder, keep=2, best=lambda steps: [10], say=_say_nothing)
    for step in (10, 15, 20, 25):
        checkpointer.save(step, _state(step))
    checkpointer.save(25, _state(1))  # is there already
    checkpointer.close()
    assert names(folder) == ["10", "20", "25"] and checkpointer.steps() == [10, 20, 25]
    found = restore(folder)
    assert found is not None and found[0] == 25
    _assert_same(found[1], _state(25))
    step, params = restore_params(folder, "params", step=20, say=_say_nothing)
    assert step == 20
    _assert_same(params, _state(20).params)
    assert not list(scratch.iterdir())


def _truncated(step: ObjectPath) -> str:
    path = step / data_file(step)
    path.write_bytes(path.read_bytes()[:-5])
    return "bytes"


def _missing(step: ObjectPath) -> str:
    (step / data_file(step)).unlink()
    return "is missing"


def _flipped(step: ObjectPath) -> str:
    path = step / data_file(step)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))
    return "does not match its digest"


def _torn_manifest(step: ObjectPath) -> str:
    (step / "manifest.json").write_bytes(b'{"format": 1')
    return "its manifest is unreadable"


@pytest.mark.parametrize("damage", [_truncated, _missing, _flipped, _torn_manifest])
def test_a_damaged_step_is_set_aside_and_the_one_before_restored(
    folder: ObjectPath, damage: Callable[[ObjectPath], str]
) -> None:
    why, said = damage(folder / "20"), list[str]()
    there = (folder / "20").files()
    found = restore(folder, said.append)
    assert found is not None and found[0] == 15
    _assert_same(found[1], _state(15))
    assert len(said) == 1 and why in said[0] and said[0].endswith("; continuing from 15")
    assert names(folder) == ["10", "15", "20.damaged"]
    assert (folder / "20.damaged").files() == there


def test_all_damaged_is_no_start_from_scratch(folder: ObjectPath) -> None:
    for step in STEPS:
        _truncated(folder / str(step))
    with pytest.raises(NoValidCheckpoint, match="no valid checkpoint left"):
        restore(folder, lambda line: None)


def test_a_step_on_its_way_is_no_step_and_is_removed_by_the_next_start(folder: ObjectPath) -> None:
    (folder / "20" / "manifest.json").unlink()
    step, _ = restore_params(folder, "ema", say=_say_nothing)
    assert step == 15 and names(folder) == ["10", "15", "20"]
    found = restore(folder)
    assert found is not None and found[0] == 15
    assert names(folder) == ["10", "15"]


def test_a_store_in_trouble_is_no_damage(
    folder: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an hour without a network would cost every checkpoint."""
    monkeypatch.setattr(store, "WAITS_S", ())
    real = ObjectPath.read_bytes

    def failing(self: ObjectPath, *given: Any) -> bytes:
        if self.name == "manifest.json":
            raise StoreError(f"{self}: cannot be reached", may_pass=True)
        return real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="cannot be reached"):
        patch.setattr(ObjectPath, "read_bytes", failing)
        restore(folder)
    found = restore(folder)
    assert found is not None and found[0] == 20


def test_rows_on_their_way_arrive_before_the_step(
    folder: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that goes on from it would lack them."""
    flushed = []

    def flush() -> None:
        flushed.append((folder / "25" / "manifest.json").exists())

    monkeypatch.setattr(step_place, "flush", flush)
    checkpointer = Checkpointer(folder, keep=2, say=_say_nothing)
    checkpointer.save(25, _state(25))
    checkpointer.close()
    assert flushed == [False] and checkpointer.steps() == [20, 25]


def test_what_does_not_arrive_makes_no_step(
    folder: ObjectPath, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    real = ObjectPath.files
    monkeypatch.setattr(ObjectPath, "files", lambda self: dict(list(real(self).items())[1:]))
    checkpointer = Checkpointer(folder, keep=2, say=_say_nothing)
    checkpointer.save(25, _state(25))
    with pytest.raises(StoreError, match="did not arrive"):
        checkpointer.wait()
    monkeypatch.undo()
    checkpointer.close()
    assert checkpointer.steps() == [10, 15, 20]


_SAVE_FOREVER = """
import jax, sys
from sdx.record.store import as_path
from sdx.training.checkpoint import Checkpointer
from tests.training.test_checkpoint import _state
checkpointer = Checkpointer(as_path(sys.argv[1]), keep=2, say=print)
step = checkpointer.steps()[-1] if checkpointer.steps() else 0
print("ready", flush=True)
while True:
    step += 1
    checkpointer.save(step, _state(step))
"""


def test_kills_at_any_moment_leave_a_step_and_nothing_else(bucket: str, scratch: Path) -> None:
    folder = as_path(f"{bucket}/run/checkpoints")
    assert isinstance(folder, ObjectPath)
    draw, newest, kills = random.Random(5), 0, 0
    while kills < 2 or not list(scratch.iterdir()):  # until one came in the middle of a save
        kills += 1
        assert kills < 20
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOREVER, str(folder)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while not (folder / str(newest + 2) / "manifest.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = restore(folder)
        assert found is not None and found[0] >= newest + 2
        newest = found[0]
        _assert_same(found[1], _state(newest))
        steps = [int(name) for name in names(folder)]
        assert steps[-1] == newest and len(steps) in (2, 3)
        for step in steps:
            files = json.loads((folder / str(step) / "manifest.json").read_text())["files"]
            assert files.keys() <= (folder / str(step)).files().keys()
    for left in scratch.iterdir():
        os.utime(left, (0, 0))
    with scratch_folder() as here:
        assert list(scratch.iterdir()) == [here.parent]


@pytest.mark.fast
def test_a_scratch_folder_in_use_is_left_alone(scratch: Path) -> None:
    with scratch_folder() as first:
        os.utime(first.parent, (0, 0))
        with scratch_folder() as second:
            assert first.is_dir() and second.is_dir() and first != second
    assert not list(scratch.iterdir())


@pytest.mark.fast
def test_the_first_process_waits_for_all_and_hears_of_a_part_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Place(step_place.ObjectPlace):
        def bring(self, step: int) -> None:
            events.append("brought")

    events, answers = list[Any](), [None, [{"state/a": ["1", 1]}, {"state/b": ["2", 2]}]]
    (tmp_path / "state" / "ocdbt.process_0").mkdir(parents=True)
    monkeypatch.setattr(process_parts, "process_count", lambda: 2)
    monkeypatch.setattr(process_parts, "mark", lambda event, value: events.append(value))
    monkeypatch.setattr(process_parts, "take_marks", lambda event: answers.pop(0))
    place = Place(ObjectPath("s3", "bucket/checkpoints"))
    proofs = process_parts.proofs_of_all(place, 5, tmp_path, 0)
    assert proofs == {"state/a": ["1", 1], "state/b": ["2", 2]}
    assert events == ["brought", {}], "told when it is there"
    answers.append(["StoreError: far away", {}])
    with pytest.raises(StoreError, match="checkpoint 5 could not be saved: StoreError: far away"):
        process_parts.proofs_of_all(place, 5, tmp_path, 0)
    monkeypatch.setattr(process_parts, "prove_files", lambda folder: int("none"))
    with pytest.raises(ValueError, match="none"):
        process_parts.proofs_of_all(place, 5, tmp_path, 0)
    assert events[-1].startswith("ValueError: invalid literal"), "the first one hears of it"
