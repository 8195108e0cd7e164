"""The real command as 2 and as 4 processes: the run of one, to rounding, whatever happens to them.

All runs have four devices, two copies of the model over two devices each; they differ in who has
the devices.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sdx.record.files import read_json
from sdx.record.metrics import read_metrics
from sdx.record.parts import read_parts
from sdx.record.store import ObjectPath, as_path, download
from sdx.training.process_parts import joined
from tests.experiment.test_resume import arrays, arrays_of
from tests.processes import Ended, Processes, run, started

STEPS = 8
MODEL = [
    "model.unet.block_out_channels=[8]",
    "model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "model.unet.attention_head_dim=[2]",
    "model.unet.layers_per_block=1",
    "model.unet.norm_num_groups=2",
    "data.resolution=16",
    "data.num_examples=40",
    "hardware.num_devices=4",
    "mesh.ici.data=2",
    "mesh.ici.fsdp=2",
    "train.per_device_batch_size=null",
    "train.global_batch_size=8",
    f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
]
RUN = [
    *MODEL,
    "run.name=run",
    f"train.max_steps={STEPS}",
    "train.ema=false",
    "lr_schedule=constant",
    "checkpoint.every=2",
    "metrics.every=1",
    "metrics.sinks=[jsonl]",
    "eval.every=4",
    "eval.num_batches=2",
    "eval.num_buckets=1",
    "sample.prompts=[a small red circle on a white background]",
    "sample.num_steps=1",
    "sample.num_adherence_prompts=null",
    "distributed.heartbeat_timeout_s=15",
]
# The step takes a third of the time to compile.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@dataclass(frozen=True)
class Run:
    """A run folder, and what its processes noted of their batches and said."""

    folder: Path
    num_processes: int
    ended: Ended | None = None

    @property
    def root(self) -> Path:
        return self.folder / "run"

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        """Losses by step; each step is told once."""
        found: dict[int, dict[str, Any]] = {}
        for line in (self.root / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            known = found.setdefault(row["step"], {})
            assert not known.keys() & row.keys() - {"step"}
            kept = ("loss", "grad_norm", "validation_loss")
            known |= {name: row[name] for name in kept if name in row}
        return found

    def batches(self, process: int) -> dict[int, dict[str, Any]]:
        """By step, the last time it was placed."""
        lines = (self.folder / f"batches-{process}.jsonl").read_text().splitlines()
        return {row["step"]: row for row in map(json.loads, lines)}

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / name).read_text())


def command(folder: Path, *more: str, output_dir: str | None = None) -> list[str]:
    note = str(folder / "batches-{process}.jsonl")
    place = f"run.output_dir={output_dir or folder}"
    return ["-m", "tests.experiment.recorded", note, *RUN, place, *more]


def finished(folder: Path, num_processes: int, *more: str) -> Run:
    """The run, from where it stands to its end."""
    ended = run(
        command(folder, *more),
        num_processes=num_processes,
        explicit=num_processes > 1,
        environment=QUICK,
        timeout_s=900,
    )
    assert ended.codes == [0] * num_processes, ended
    return Run(folder, num_processes, ended)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("four"), 4)


def assert_close(left: Run, right: Run) -> None:
    assert left.rows.keys() == right.rows.keys() == {*range(1, STEPS + 1)}
    for step, row in left.rows.items():
        assert row.keys() == right.rows[step].keys()
        for name, value in row.items():
            limit = 1e-5 if name == "grad_norm" else 1e-6
            assert right.rows[step][name] == pytest.approx(value, rel=limit), (step, name)


def test_losses_are_those_of_one_process(one: Run, two: Run, four: Run) -> None:
    assert_close(one, two)
    assert_close(one, four)
    assert sum("validation_loss" in row for row in one.rows.values()) == STEPS // 4


def test_each_process_reads_its_own_part_of_the_same_batch(one: Run, two: Run, four: Run) -> None:
    whole = one.batches(0)
    assert [*range(STEPS)] == sorted(whole)[:STEPS]
    for many in (two, four):
        for step in range(STEPS):
            parts = [many.batches(process)[step] for process in range(many.num_processes)]
            rows = [row for part in parts for row in part["rows"]]
            assert sorted(rows) == [*range(8)], "disjoint, and all of it"
            by_row = dict(zip(rows, (i for p in parts for i in p["indices"]), strict=True))
            assert [by_row[row] for row in range(8)] == whole[step]["indices"]
            placed = {start: tokens for part in parts for start, tokens in part["tokens"].items()}
            assert placed == whole[step]["tokens"], "where the one process has them"


def test_the_first_process_alone_writes_and_speaks(two: Run, four: Run) -> None:
    for many in (two, four):
        assert many.ended is not None
        first, *others = many.ended.outputs
        assert first.count(f"finished {STEPS} steps") == 1
        assert ["" for _ in others] == others
        assert (many.root / "log.txt").read_text().count(f"finished {STEPS} steps") == 1
        assert [path.name for path in many.root.glob("attempts/*.json")] == ["1.json"]
        assert many.read("status.json")["status"] == "finished"
        assert not [*many.folder.glob(".sdx-*")] and not (many.root / "lock.json").exists()
        assert "process_id: 0" not in (many.root / "config.yaml").read_text()


def test_pictures_and_export_are_those_of_one_process(one: Run, two: Run, four: Run) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    pixels = np.asarray(Image.open(one.root / f"samples/{STEPS:07}.png"), np.int32)
    weights = load_file(one.root / "export" / name)
    for many in (two, four):
        theirs = np.asarray(Image.open(many.root / f"samples/{STEPS:07}.png"), np.int32)
        assert np.abs(theirs - pixels).max() <= 1
        found = load_file(many.root / "export" / name)
        assert found.keys() == weights.keys()
        assert all(np.allclose(found[key], weights[key], atol=1e-5) for key in weights)


def wait_for(processes: Processes, run: Run, step: int) -> None:
    """Until a checkpoint of `step` is there."""
    processes.wait_until_said(0, "compiled")
    manifest = run.root / "checkpoints" / str(step) / "manifest.json"
    while not manifest.exists():
        assert all(process.poll() is None for process in processes.running), processes.output(0)
        time.sleep(0.02)


def test_a_killed_process_ends_the_run_and_the_restart_is_bit_equal(
    two: Run, tmp_path: Path
) -> None:
    cut = Run(tmp_path, 2)
    with started(command(tmp_path), environment=QUICK | {"SLOW": "1"}) as processes:
        wait_for(processes, cut, 2)
        processes.send(1, signal.SIGKILL)
        ended = processes.end()
    assert ended.codes == [1, -signal.SIGKILL], ended
    assert "process 1 of 2 on " in ended.outputs[0]
    again = finished(tmp_path, 2)
    assert again.ended is not None and "continuing from step" in again.ended.outputs[0]
    assert again.rows == two.rows
    theirs, ours = arrays(two.root, STEPS), arrays(again.root, STEPS)
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_hosts_that_share_no_disk_keep_a_run_in_a_store(
    two: Run, bucket: str, tmp_path: Path
) -> None:
    """Stopped, killed, and each time on machines where nothing is left of the start before."""
    root = as_path(f"{bucket}/runs/run")
    assert isinstance(root, ObjectPath)
    scratch = tmp_path / "scratch"

    def start(**more: str) -> AbstractContextManager[Processes]:
        shutil.rmtree(scratch, ignore_errors=True)
        for number in range(2):
            (scratch / str(number)).mkdir(parents=True)
        return started(
            command(tmp_path, output_dir=f"{bucket}/runs"),
            environment=QUICK | {"TMPDIR": str(scratch / "{process}")} | more,
        )

    def wait(processes: Processes, is_there: Callable[[], bool]) -> None:
        while not is_there():
            assert all(process.poll() is None for process in processes.running), processes.output(0)
            time.sleep(0.1)

    with start(SLOW="1") as processes:
        wait(processes, (root / "checkpoints" / "2" / "manifest.json").exists)
        processes.send(1, signal.SIGTERM)
        ended = processes.end()
    assert ended.codes == [75, 75], ended
    stopped = read_json(root / "status.json") or {}
    assert stopped["status"] == "interrupted" and 2 <= stopped["step"] < STEPS - 1
    with start(SLOW="1") as processes:
        wait(processes, lambda: read_metrics(root / "metrics.jsonl")[-1]["step"] > stopped["step"])
        processes.send(1, signal.SIGKILL)
        ended = processes.end()
    assert ended.codes == [1, -signal.SIGKILL], ended
    assert f"continuing from step {stopped['step']}" in ended.outputs[0]
    with start() as processes:
        ended = processes.end(1800)
    assert ended.codes == [0, 0], ended
    download(root, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(read_parts(root / "metrics.jsonl")))
    assert Run(tmp_path, 2).rows == two.rows
    same = ("export/unet/diffusion_pytorch_model.safetensors", f"samples/{STEPS:07}.png")
    assert [n for n in same if (root / n).read_bytes() != (two.root / n).read_bytes()] == []
    kept = tmp_path / "run" / "checkpoints" / str(STEPS)
    assert {f"ocdbt.process_{number}" for number in range(2)} <= set(os.listdir(kept / "state"))
    with joined(kept) as whole:
        theirs, ours = arrays(two.root, STEPS), arrays_of(whole)
    assert theirs.keys() == ours.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert [list((scratch / str(number)).iterdir()) for number in range(2)] == [[], []]
    assert [path.name for path in as_path(f"{bucket}/runs").iterdir()] == ["run"]


def test_a_signal_to_one_saves_one_step_and_other_processes_go_on(one: Run, tmp_path: Path) -> None:
    """Stopped as 2 processes, goes on as 4 of which those of one copy read, ends like one."""
    cut = Run(tmp_path, 2)
    with started(command(tmp_path), environment=QUICK | {"SLOW": "1"}) as processes:
        wait_for(processes, cut, 2)
        processes.send(1, signal.SIGTERM)
        ended = processes.end()
    assert ended.codes == [75, 75], ended
    status = cut.read("status.json")
    assert status["status"] == "interrupted" and 2 <= status["step"] < STEPS
    assert (cut.root / "checkpoints" / str(status["step"]) / "manifest.json").is_file()
    again = finished(tmp_path, 4, "checkpoint.single_replica_restore=true")
    assert again.ended is not None
    assert f"continuing from step {status['step']}" in again.ended.outputs[0]
    assert again.read("attempts/2.json")["first_step"] == status["step"]
    assert_close(one, again)


def test_hosts_that_see_another_folder_are_named(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    ended = run(["-m", "sdx.train", *RUN, "run.output_dir=outputs"], folder=folders)
    assert ended.codes == [2, 2], ended
    text = ended.outputs[0]
    assert text.startswith("sdx: run.output_dir=outputs: is not one folder for all hosts"), ended
    assert text.count("\n") == 1, "one message"
    assert f"({folders[0]}/outputs) writes there is not seen by process 1 on " in text
    assert f"({folders[1]}/outputs)" in text
    assert sorted(tmp_path.rglob("*")) == folders, "nothing is left there"


def test_hosts_with_other_data_or_another_command_are_named(tmp_path: Path) -> None:
    for number, sides in enumerate(([16, 18], [16, 18, 20])):
        folder = tmp_path / f"data-{number}"
        folder.mkdir()
        for side in sides:
            Image.new("RGB", (side, side)).save(folder / f"{side}.png")
            (folder / f"{side}.txt").write_text(f"a square of {side}")
    given = [
        "data=imagefolder",
        f"data.dir={tmp_path}/data-{{process}}",
        "optimizer.lr=1e-{process}",
    ]
    shared = [key for key in MODEL if not key.startswith("data.num_examples")]
    arguments = ["-m", "sdx.train", *shared, "run.name=run", f"run.output_dir={tmp_path}"]
    ended = run([*arguments, *given])
    assert ended.codes == [2, 2], ended
    text = ended.outputs[0]
    assert text.count("sdx: the hosts of this run do not agree") == 1, ended
    assert "optimizer.lr is 0.1 there, 1 on the first" in text
    assert "data is 3 examples, fingerprint " in text and "there, 2 examples, fingerprint " in text
    assert not (tmp_path / "run").exists()
