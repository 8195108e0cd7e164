"""Checkpoints under every fault we know: what comes back was saved, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sdx.training import process_parts, step_folder
from sdx.training.checkpoint import (
    Checkpointer,
    CheckpointMismatch,
    NoValidCheckpoint,
    restore_params,
    restore_step,
)

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = (10, 15, 20)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A state with every kind of node: attributes, dicts, tuples, named tuples, None."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any


def _state(step: int, *, ema: bool = True, width: int = 16) -> State:
    weights = jax.random.normal(jax.random.key(step), (8, width))
    params = {"unet": {"blocks": {"0": {"kernel": weights}}, "bias": weights[0, :3]}}
    average = jax.tree.map(lambda a: (a * 0.5).astype(jnp.bfloat16), params) if ema else None
    opt_state = optax.adamw(1e-3).init(params)
    return State(jnp.asarray(step, jnp.int32), params, average, opt_state)


def _abstract(state: State) -> State:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)


ABSTRACT = _abstract(_state(0))


def _assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of STEPS; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpointer = Checkpointer(folder, keep=3, say=_say_nothing)
    for step in STEPS:
        checkpointer.save(step, _state(step))
    checkpointer.close()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def _say_nothing(line: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {line}")


def _restore(folder: Path, say: Callable[[str], None] = _say_nothing) -> tuple[int, Any] | None:
    checkpointer = Checkpointer(folder, keep=3, say=say)
    try:
        return checkpointer.restore(ABSTRACT)
    finally:
        checkpointer.close()


def _assert_falls_back(folder: Path, why: str) -> None:
    """Restores 15 for 20, says so in one line that matches `why`, and keeps 20 aside."""
    said: list[str] = []
    found = _restore(folder, said.append)
    assert found is not None and found[0] == 15
    _assert_same(found[1], _state(15))
    assert len(said) == 1, said
    assert said[0].startswith("checkpoint 20 is damaged: ")
    assert said[0].endswith("; continuing from 15")
    assert why in said[0]
    assert (folder / "20.damaged").is_dir() and not (folder / "20").exists()


@pytest.mark.fast
def test_the_state_comes_back_as_saved(folder: Path) -> None:
    found = _restore(folder)
    assert found is not None and found[0] == 20
    _assert_same(found[1], _state(20))


@pytest.mark.fast
def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert _restore(tmp_path / "checkpoints") is None


def test_a_donated_state_is_saved_as_it_was(tmp_path: Path) -> None:
    add = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    state = {"step": jnp.int32(0), "params": [jnp.zeros((512, 512)) for _ in range(8)]}
    checkpointer = Checkpointer(tmp_path, keep=2, say=_say_nothing)
    state = add(state)
    checkpointer.save(1, state)
    for _ in range(20):
        state = add(state)
    found = Checkpointer(tmp_path, keep=2, say=_say_nothing)
    checkpointer.close()
    restored = found.restore(jax.eval_shape(lambda: state))
    found.close()
    assert restored is not None
    for leaf in jax.tree.leaves(restored[1]):
        np.testing.assert_array_equal(np.asarray(leaf), 1)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_another_number_of_devices_gets_the_same_bits(tmp_path: Path, num_devices: int) -> None:
    devices = np.array(jax.devices())
    over_eight = NamedSharding(Mesh(devices, ("fsdp",)), PartitionSpec("fsdp"))
    here = NamedSharding(Mesh(devices[:num_devices], ("fsdp",)), PartitionSpec("fsdp"))
    kernel = jax.device_put(jnp.arange(1024.0).reshape(32, 32), over_eight)
    state = {"step": jnp.int32(3), "params": {"kernel": kernel}}
    checkpointer = Checkpointer(tmp_path, keep=2, say=_say_nothing)
    checkpointer.save(3, state)
    abstract = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(devices[0])),
        "params": {"kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=here)},
    }
    checkpointer.wait()
    found = checkpointer.restore(abstract)
    checkpointer.close()
    assert found is not None
    _assert_same(found[1], state)
    restored: Any = found[1]["params"]["kernel"]
    assert restored.sharding == here


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2, say=_say_nothing)
    for step in (1, 2, 3, 10):
        checkpointer.save(step, _state(step))
    checkpointer.wait()
    assert checkpointer.steps() == [3, 10]
    before = (tmp_path / "10" / "manifest.json").stat().st_mtime_ns
    checkpointer.save(10, _state(99))
    checkpointer.close()
    assert (tmp_path / "10" / "manifest.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "3"]


def test_a_flipped_bit_in_any_file_is_found(folder: Path) -> None:
    rng = random.Random(0)
    files = sorted(path for path in (folder / "20").rglob("*") if path.is_file())
    assert len(files) >= 8
    for path in files:
        whole = path.read_bytes()
        for _ in range(5):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            manifest = path.name == "manifest.json"
            _assert_falls_back(folder, "manifest" if manifest else "does not match its digest")
            (folder / "20.damaged").rename(folder / "20")
        path.write_bytes(whole)
    found = _restore(folder)
    assert found is not None and found[0] == 20


def test_a_truncated_or_missing_file_is_found(folder: Path) -> None:
    files = sorted(path for path in (folder / "20").rglob("*") if path.is_file())
    for path in files:
        whole = path.read_bytes()
        manifest = path.name == "manifest.json"
        path.write_bytes(whole[:-1])
        _assert_falls_back(folder, "manifest" if manifest else "bytes")
        (folder / "20.damaged").rename(folder / "20")
        path.unlink()
        _assert_falls_back(folder, "no manifest" if manifest else "is missing")
        (folder / "20.damaged").rename(folder / "20")
        path.write_bytes(whole)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder / "20")
    (folder / "20").mkdir()


def _data_gone(folder: Path) -> None:
    shutil.rmtree(folder / "20" / "state")


def _misnumbered(folder: Path) -> None:
    shutil.rmtree(folder / "20")
    shutil.copytree(folder / "10", folder / "20")


def _forged(folder: Path) -> None:
    """Step 10 under the name 20 with a manifest that says 20, as a script that renames would do."""
    _misnumbered(folder)
    path = folder / "20" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["step"] = 20
    manifest["sha256"] = step_folder.manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_empty, "no manifest"),
        (_data_gone, "is missing"),
        (_misnumbered, "its manifest is of step 10"),
        (_forged, "its state is of step 10"),
    ],
)
def test_a_folder_that_is_not_what_it_claims_is_found(
    folder: Path, damage: Callable[[Path], None], why: str
) -> None:
    damage(folder)
    _assert_falls_back(folder, why)


def test_several_damaged_ones_are_each_reported_and_kept(folder: Path) -> None:
    (folder / "20.damaged").mkdir()  # from an earlier start
    _empty(folder)
    (folder / "15" / "manifest.json").unlink()
    said: list[str] = []
    found = _restore(folder, said.append)
    assert found is not None and found[0] == 10
    assert said == [
        "checkpoint 20 is damaged: it has no manifest",
        "checkpoint 15 is damaged: it has no manifest; continuing from 10",
    ]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["10", "15.damaged", "20.damaged", "20.damaged.2"]


@pytest.mark.fast
def test_all_damaged_refuses_this_start_and_the_next(folder: Path) -> None:
    for step in STEPS:
        (folder / str(step) / "manifest.json").write_text("{}")
    said: list[str] = []
    with pytest.raises(NoValidCheckpoint, match=r"no valid checkpoint left.*run\.name"):
        _restore(folder, said.append)
    assert len(said) == 3
    with pytest.raises(NoValidCheckpoint):
        _restore(folder)


@pytest.mark.fast
def test_a_torn_save_is_no_checkpoint_and_no_damage(folder: Path) -> None:
    (folder / "20").rename(folder / ".saving-25")
    shutil.copytree(folder / "15", folder / ".saving-5.old")
    (folder / "notes").mkdir()
    found = _restore(folder)
    assert found is not None and found[0] == 15
    assert sorted(path.name for path in folder.iterdir()) == ["10", "15", "notes"]


def test_another_model_is_a_mismatch_not_damage(folder: Path) -> None:
    checkpointer = Checkpointer(folder, keep=3, say=_say_nothing)
    with pytest.raises(CheckpointMismatch) as mismatch:
        checkpointer.restore(_abstract(_state(0, width=24)))
    text = str(mismatch.value)
    assert "params/unet/blocks/0/kernel is float32 (8, 16) there, float32 (8, 24) here" in text
    with pytest.raises(CheckpointMismatch, match="ema/unet/bias is bfloat16 .3,. there, missing"):
        checkpointer.restore(_abstract(_state(0, ema=False)))
    assert checkpointer.steps() == list(STEPS)
    checkpointer.close()


_FULL_DISK = """
import resource, sys
from pathlib import Path
import jax
from sdx.training.checkpoint import Checkpointer

checkpointer = Checkpointer(Path(sys.argv[1]), keep=2, say=print)
kernel = jax.random.normal(jax.random.key(0), (1024, 1024))
state = {"step": jax.numpy.int32(25), "params": kernel}
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the kernel's answer: file too large
checkpointer.save(25, state)
try:
    checkpointer.wait()
except Exception as error:
    print("raised", "os_error_code='27'" in str(error))
checkpointer.wait()
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
checkpointer.save(25, state)
checkpointer.close()
print(checkpointer.steps())
"""


def test_a_full_disk_is_raised_once_and_spares_the_older_steps(folder: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(folder)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Orbax logs the error at length
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert said.stdout.splitlines() == ["raised True", "['10', '15', '20']", "[20, 25]"]


def test_an_error_of_the_proof_is_raised_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> Any:
        raise OSError("the disk is gone")

    checkpointer = Checkpointer(tmp_path, keep=2, say=_say_nothing)
    with monkeypatch.context() as patch:
        patch.setattr(process_parts, "prove_files", fail)
        checkpointer.save(1, _state(1))
        with pytest.raises(OSError, match="the disk is gone"):
            checkpointer.save(2, _state(2))
    checkpointer.save(3, _state(3))
    checkpointer.close()
    assert checkpointer.steps() == [3]


def test_a_step_of_another_run_is_read_and_nothing_there_changes(folder: Path) -> None:
    (folder / ".saving-25").mkdir()
    _empty(folder)
    said: list[str] = []
    step, state = restore_step(folder, None, ABSTRACT, say=said.append)
    assert step == 15
    _assert_same(state, _state(15))
    assert said == ["checkpoint 20 is damaged: it has no manifest; continuing from 15"]
    step, state = restore_step(folder, 10, ABSTRACT, say=_say_nothing)
    assert step == 10
    _assert_same(state, _state(10))
    with pytest.raises(NoValidCheckpoint, match="no valid checkpoint 20; steps there: 10, 15"):
        restore_step(folder, 20, ABSTRACT, say=said.append)
    with pytest.raises(NoValidCheckpoint, match="steps there: none"):
        restore_step(folder / "nowhere", None, ABSTRACT, say=_say_nothing)
    assert sorted(p.name for p in folder.iterdir()) == [".saving-25", "10", "15", "20"]


def test_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    step, ema = restore_params(folder, "ema", say=_say_nothing)
    assert step == 20
    _assert_same(ema, _state(20).ema)
    step, params = restore_params(folder, "params", step=10, say=_say_nothing)
    assert step == 10
    _assert_same(params, _state(10).params)
    without = Checkpointer(tmp_path / "without", keep=2, say=_say_nothing)
    without.save(1, _state(1, ema=False))
    without.close()
    with pytest.raises(CheckpointMismatch, match="holds no ema"):
        restore_params(tmp_path / "without", "ema", say=_say_nothing)


# Forks a worker for each line it reads: the imports, three seconds of every process, happen once.
# A worker goes on from what it finds and saves without pause, so that most kills hit a save.
_WORKERS = """
import hashlib, os, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from sdx.training.checkpoint import Checkpointer

def say(line): print("said", line, flush=True)
def digest(state):
    leaves = jax.device_get(jax.tree.leaves(state))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
def initial():
    params = [jnp.full((1024, 1024), i, jnp.float32) for i in range(8)]
    return {"step": jnp.int32(0), "params": params}
@jax.jit
def advance(state):
    step = state["step"] + 1
    return {"step": step, "params": [a * 0.999 + step for a in state["params"]]}

def work():
    print("pid", os.getpid(), "-", flush=True)
    checkpointer = Checkpointer(Path(sys.argv[1]), keep=2, say=say)
    found = checkpointer.restore(jax.eval_shape(initial))
    state = initial() if found is None else jax.tree.map(jnp.asarray, found[1])
    jax.block_until_ready(advance(state))  # so that the kill does not hit the compilation
    print("restored", int(state["step"]), digest(state), flush=True)
    while True:
        state = advance(state)
        step = int(state["step"])
        print("saving", step, digest(state), flush=True)
        checkpointer.save(step, state)
        checkpointer.wait()
        print("saved", step, digest(state), flush=True)

assert len(os.listdir("/proc/self/task")) == 1, "a fork beside threads could hang"
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        work()
    os.waitpid(child, 0)
    print("killed", 0, "-", flush=True)
"""


def _wait_for_a_save(folder: Path) -> None:
    until = time.monotonic() + 10.0
    while not any(folder.glob(".saving-*")) and time.monotonic() < until:
        time.sleep(0.001)


def test_kills_at_any_time_leave_a_saved_state_and_all_that_was_promised(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    rng = random.Random(1)
    digests: dict[int, str] = {}
    promised = num_kills = num_torn = 0
    with subprocess.Popen(
        [sys.executable, "-c", _WORKERS, str(folder)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
    ) as workers:
        assert workers.stdin is not None and workers.stdout is not None
        while num_kills < 10 or num_torn < 4 or promised < 3:
            assert num_kills < 60, f"{num_torn} of 60 kills hit a save, step {promised} was saved"
            num_kills += 1
            workers.stdin.write("another\n")
            workers.stdin.flush()
            pid = int(workers.stdout.readline().split()[1])
            lines = [workers.stdout.readline()]
            if num_kills % 2:
                time.sleep(rng.uniform(0.0, 1.0))
            else:  # where saves are quick, few kills at any time would hit one
                _wait_for_a_save(folder)
                time.sleep(rng.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
            while not lines[-1].startswith("killed"):
                lines.append(workers.stdout.readline())
            num_torn += any(folder.glob(".saving-*"))
            for line in lines[:-1]:
                word, number, digest = line.split()  # not `said …`: a kill is no damage
                step = int(number)
                assert digests.setdefault(step, digest) == digest, f"step {step} differs"
                if word == "restored":
                    assert step >= promised
                if word == "saved":
                    promised = step
