"""A run in an S3 store is the run it would be in a folder, whatever happens to it."""

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdx.experiment import hosts
from sdx.experiment.drawing import draw
from sdx.experiment.exporting import export
from sdx.experiment.unet_checkpoint import open_unet_checkpoint
from sdx.pipeline import load
from sdx.record.files import read_json
from sdx.record.lock import RefusedStart, RunLock, RunLocked, is_held
from sdx.record.metrics import read_metrics
from sdx.record.parts import read_parts
from sdx.record.paths import RunPaths
from sdx.record.store import ObjectPath, StoreError, as_path, download, write_bytes
from sdx.train import main as train
from sdx.weights.errors import WeightsError
from sdx.weights.export import ExportError
from sdx.weights.export_folder import check_replaceable, export_folder, exported
from tests.experiment.conftest import Command
from tests.micro import micro_config
from tests.object_store import ENVIRONMENT, make_bucket

STEPS = 24
RUN = [f"train.max_steps={STEPS}", "checkpoint.every=5", "sample.every=10", "run.name=run"]
KEPT = ("step", "loss", "grad_norm", "lr", "num_bad_steps")
UNET = "unet/diffusion_pytorch_model.safetensors"


def rows(paths: RunPaths) -> list[dict[str, Any]]:
    return [{key: row[key] for key in KEPT} for row in read_metrics(paths.metrics)]


def start(command: Command, *, after: int = 0, paths: RunPaths) -> subprocess.Popen[str]:
    """The run, once a row past the step `after` is in the store."""
    process = command.start(*RUN, f"run.output_dir={paths.root.parent}", slow_after=after + 2)
    deadline = time.monotonic() + 600
    while (rows(paths) or [{"step": 0}])[-1]["step"] <= after:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"step {after} was not reached:\n{process.communicate()[0]}")
        time.sleep(0.02)
    return process


@pytest.fixture(scope="module")
def monkeypatched() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def runs(
    s3_address: str, monkeypatched: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunPaths, RunPaths, str]:
    """A run that nothing happened to, in a folder; the same one in a store, killed, refused to a
    second starter, stopped by SIGTERM and finished; and what those starts said."""
    command = Command(tmp_path_factory.mktemp("runs"))
    code, output = command.run(*RUN)
    assert code == 0, output
    paths = RunPaths(as_path(f"{make_bucket(s3_address, monkeypatched)}/deep/runs/run"))
    pause = random.Random(3).random
    process = start(command, after=6, paths=paths)
    time.sleep(pause() * 0.2)
    process.kill()
    said = [process.communicate()[0]]
    assert process.returncode == -signal.SIGKILL
    process = start(command, after=rows(paths)[-1]["step"] + 1, paths=paths)
    with pytest.raises(RunLocked, match=f"in use by process {process.pid}"):
        RunLock(paths.lock).acquire()
    process.send_signal(signal.SIGTERM)
    said += [process.communicate(timeout=600)[0]]
    assert process.returncode == 75, said
    status = read_json(paths.status) or {}
    assert status["status"] == "interrupted" and not is_held(paths.lock)
    assert (paths.checkpoints / str(status["step"]) / "manifest.json").exists()
    code, output = command.run(*RUN, f"run.output_dir={paths.root.parent}")
    assert code == 0, output
    assert f"continuing from step {status['step']}" in output
    return RunPaths(command.path("run")), paths, "".join([*said, output])


def test_the_run_is_the_same_to_the_last_bit(runs: tuple[RunPaths, RunPaths, str]) -> None:
    local, store, _ = runs
    assert len(rows(store)) == STEPS and rows(store) == rows(local)
    for name in (f"export/{UNET}", f"samples/{STEPS:07d}.png", "samples/0000010.png"):
        assert (store.root / name).read_bytes() == (local.root / name).read_bytes()


def test_the_record_is_whole(runs: tuple[RunPaths, RunPaths, str]) -> None:
    local, store, _ = runs
    assert (read_json(store.status) or {})["status"] == "finished"
    attempts = [read_json(store.attempts / f"{n}.json") or {} for n in (1, 2, 3)]
    assert [attempt["outcome"] for attempt in attempts] == ["interrupted"] * 2 + ["finished"]
    assert "finished 24 steps" in read_parts(store.log)[-1]
    assert exported(store.export).keys() == exported(local.export).keys()
    names = {path.name.partition(".")[0] for path in local.root.iterdir() if path.name[0] != "."}
    assert {path.name.partition(".")[0] for path in store.root.iterdir()} == names - {"lock"}
    kept = sorted(path.name for path in local.checkpoints.iterdir())
    assert [path.name for path in store.checkpoints.iterdir()] == kept
    assert store.loss_plot.read_bytes()[:4] == b"\x89PNG"


def test_nothing_tells_a_secret(runs: tuple[RunPaths, RunPaths, str]) -> None:
    _, store, said = runs
    secrets = [ENVIRONMENT["AWS_SECRET_ACCESS_KEY"], ENVIRONMENT["AWS_ACCESS_KEY_ID"]]
    for name in store.root.files():
        content = b"" if "/state/" in name else (store.root / name).read_bytes()
        assert not any(secret.encode() in content for secret in secrets), name
    assert not any(secret in said for secret in secrets)


def test_tensorboard_shows_every_step_once(
    runs: tuple[RunPaths, RunPaths, str], tmp_path: Path
) -> None:
    local, store, _ = runs
    download(store.tensorboard, tmp_path)
    shown = EventAccumulator(str(tmp_path)).Reload()
    losses = {event.step: event.value for event in shown.Scalars("loss")}
    assert len(shown.Scalars("loss")) == STEPS
    wanted = {row["step"]: np.float32(row["loss"]) for row in rows(local)}
    assert losses == wanted
    assert [event.step for event in shown.Images("samples")] == [10, 20, STEPS]


def test_the_run_is_read_by_its_url(runs: tuple[RunPaths, RunPaths, str], tmp_path: Path) -> None:
    local, store, _ = runs
    folder = draw(
        f"{store.root}@20",
        ["a small red circle"],
        negative_prompt=None,
        num_images=1,
        num_steps=2,
        guidance_scale=None,
        sampler=None,
        seed=0,
        out=None,
        model=None,
    )
    assert folder == store.samples / "drawn" and (folder / "grid.png").exists()
    export(str(store.root), tmp_path / "out")
    assert (tmp_path / "out" / UNET).read_bytes() == (local.export / UNET).read_bytes()
    with pytest.raises(WeightsError, match="no sdx run; model folders and files are read locally"):
        load(f"{store.root}/export")
    model = micro_config().model
    unets = [open_unet_checkpoint(str(paths.root), model) for paths in (local, store)]
    with unets[0].tensors("unet") as here, unets[1].tensors("unet") as there:
        assert here.shapes() == there.shapes()
        assert (here.read("conv_in.weight") == there.read("conv_in.weight")).all()


@pytest.mark.release
def test_a_run_in_a_store_is_forked(runs: tuple[RunPaths, RunPaths, str], tmp_path: Path) -> None:
    store = runs[1]
    fork = [*RUN, "train.max_steps=21", "run.name=fork", "export.at_end=false"]
    code, output = Command(tmp_path).run(*fork, f"run.resume_from={store.root}@20")
    assert code == 0 and f"forked from {store.root} at step 20" in output, output


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://sdx-no-such-bucket/runs", "there is no s3://sdx-no-such-bucket; make it"),
        ("s3://key:canary-secret@bucket/runs", "must not hold credentials"),
    ],
)
def test_a_store_that_cannot_be_written_to_refuses_the_start(
    bucket: str, url: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train([f"run.output_dir={url}", "train.max_steps=1"]) == 2
    text = capfd.readouterr().err
    assert said in text and "Traceback" not in text and "canary" not in text


def test_a_host_that_sees_another_store_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(own: list[Any]) -> list[list[Any]]:
        assert own[0] is None, "the first one sees what it wrote"
        return [own, ["refused (Forbidden)", "far", own[2]], own]

    monkeypatch.setattr(hosts, "process_count", lambda: 3)
    monkeypatch.setattr(hosts, "gather", gather)
    folder = as_path(f"{bucket}/runs")
    with pytest.raises(RefusedStart) as caught:
        hosts.check_same_folder(folder, "run.output_dir")
    assert f"not seen by process 1 on far ({folder}: refused (Forbidden)); give" in str(
        caught.value
    )
    assert not folder.exists(), "nothing is left there"


def test_an_export_in_a_store_is_replaced_and_a_torn_one_is_ours(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = as_path(f"{bucket}/run/export")
    assert isinstance(folder, ObjectPath)

    def write(*names: str) -> None:
        with export_folder(folder, {"of": "run", "step": 3}) as draft:
            for name in names:
                (draft / name).write_text(name)

    write("a", "b")
    assert exported(folder)["step"] == 3 and exported(folder)["files"] == ["a", "b"]
    with monkeypatch.context() as patch, pytest.raises(StoreError, match="gone"):
        patch.setattr("sdx.weights.export_folder.upload", _gone)
        write("b", "c")
    assert "step" not in exported(folder) and not (folder / "a").exists()
    check_replaceable(folder, "run")
    with pytest.raises(ExportError, match="not of other"):
        check_replaceable(folder, "other")
    write("b", "c")
    assert folder.files().keys() == {"b", "c", "sdx.json"}
    write_bytes(folder / "notes.txt", b"")
    with pytest.raises(ExportError, match="notes.txt"):
        check_replaceable(folder, "run")


def _gone(*_: Any, **__: Any) -> None:
    raise StoreError("the network is gone", may_pass=True)
