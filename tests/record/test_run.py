"""The acts of a start: policies, the finished run, attempts, what a refused start leaves alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdx.record.lock import RefusedStart, RunLocked
from sdx.record.paths import RunPaths
from sdx.record.run import Admission, AlreadyFinished, Change, RunRecord, admit, start
from sdx.record.status import Status, read_status, write_status

pytestmark = pytest.mark.fast
REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "aB3" * 11


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "outputs" / "run")


def _start(paths: RunPaths, **changed: Any) -> RunRecord:
    arguments: dict[str, Any] = {
        "config_yaml": "run:\n  seed: 0\n",
        "config": {"run": {"seed": 0}},
        "overrides": ["run.seed=0"],
        "resume": "auto",
        "max_steps": 10,
        "devices": ["cpu:0"],
    }
    return start(paths, **{**arguments, **changed})


def _tree(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith(".guard")
    }


def _attempt(paths: RunPaths, number: int) -> dict[str, Any]:
    return json.loads((paths.attempts / f"{number}.json").read_text())


def _run(paths: RunPaths) -> dict[str, Any]:
    return json.loads(paths.run.read_text())


def test_a_first_start_writes_the_record(paths: RunPaths) -> None:
    assert admit(paths, resume="auto", max_steps=10) is Admission.fresh
    assert not paths.root.exists()
    record = _start(paths)
    assert (record.attempt, record.resumes) == (1, False)
    assert paths.config.read_text() == "run:\n  seed: 0\n"
    run = _run(paths)
    assert run["overrides"] == ["run.seed=0"] and run["config"] == {"run": {"seed": 0}}
    assert run["devices"] == ["cpu:0"] and run["attempts"] == 1 and run["parent"] is None
    assert {"git_commit", "git_patch", "packages", "python", "host", "argv"} <= run.keys()
    status = read_status(paths)
    assert status is not None and (status.status, status.step) == (Status.running, 0)
    record.update(adherence={"colour": 0.9})
    record.finish(Status.finished, step=10)
    assert _run(paths)["adherence"] == {"colour": 0.9} and _run(paths)["attempts"] == 1
    assert not paths.lock.exists()


def test_a_finished_run_says_so_and_a_larger_limit_continues_it(paths: RunPaths) -> None:
    _start(paths).finish(Status.finished, step=10)
    before = _tree(paths.root)
    for limit in (10, 9):
        with pytest.raises(AlreadyFinished, match="finished.*train.max_steps"):
            _start(paths, max_steps=limit)
    assert _tree(paths.root) == before
    record = _start(paths, max_steps=20)
    assert (record.attempt, record.resumes) == (2, True)
    record.finish(Status.finished, step=20)


def test_attempts_tell_what_each_start_did(paths: RunPaths) -> None:
    record = _start(paths)
    record.begin(0)
    record.progress(4)
    record.finish(Status.interrupted, reason="SIGTERM")
    record.finish(Status.finished, step=99)  # only the first end counts
    first = _attempt(paths, 1)
    assert (first["first_step"], first["last_step"], first["outcome"]) == (0, 4, "interrupted")
    assert first["reason"] == "SIGTERM" and first["ended"] >= first["started"]
    record = _start(paths, overrides=["train.max_steps=10"])
    record.begin(3, cut_rows=[{"step": 4, "loss": 0.5}])
    record.finish(Status.finished, step=10)
    second = _attempt(paths, 2)
    assert (second["first_step"], second["last_step"], second["outcome"]) == (3, 10, "finished")
    assert second["cut_rows"] == [{"step": 4, "loss": 0.5}]
    assert second["overrides"] == ["train.max_steps=10"] and second["pid"] and second["host"]
    status = read_status(paths)
    assert status is not None and (status.status, status.step) == (Status.finished, 10)
    assert _run(paths)["attempts"] == 2


def test_never_refuses_a_folder_that_exists_and_must_one_that_does_not(paths: RunPaths) -> None:
    with pytest.raises(RefusedStart, match=r"run\.resume=must"):
        _start(paths, resume="must")
    assert not paths.root.exists() and not paths.root.parent.exists()
    _start(paths, resume="never").finish(Status.interrupted)
    before = _tree(paths.root)
    with pytest.raises(RefusedStart, match=r"run\.resume=never.*exists"):
        _start(paths, resume="never")
    with pytest.raises(RefusedStart, match="holds no run with a checkpoint"):
        _start(paths, resume="must")
    assert _tree(paths.root) == before
    (paths.checkpoints / "5").mkdir(parents=True)
    _start(paths, resume="must").finish(Status.interrupted)


def test_never_spares_a_folder_that_is_not_a_run_and_a_file_is_refused(paths: RunPaths) -> None:
    paths.root.mkdir(parents=True)
    assert admit(paths, resume="never", max_steps=1) is Admission.fresh
    (paths.root / "thesis.tex").write_text("precious")
    with pytest.raises(RefusedStart, match="never"):
        _start(paths, resume="never")
    with pytest.raises(RefusedStart, match=r"cannot be written \(Not a directory\)"):
        _start(RunPaths(Path("/dev/null/runs/run")))
    with pytest.raises(RefusedStart, match="is a file"):
        _start(RunPaths(paths.root / "thesis.tex"))


def test_a_queued_run_is_not_yet_an_existing_one(paths: RunPaths) -> None:
    paths.root.mkdir(parents=True)
    write_status(paths, Status.queued, step=0)
    _start(paths, resume="never").finish(Status.finished, step=10)


def test_forbidden_changes_are_shown_and_refused_and_others_recorded(paths: RunPaths) -> None:
    _start(paths).finish(Status.interrupted)
    before = _tree(paths.root)
    lr = Change("optimizer.lr", 1e-4, 1e-5, "warn")
    seed = Change("run.seed", 0, 1, "forbidden")
    with pytest.raises(RefusedStart, match=r"run\.seed: 0 there, 1 here") as refusal:
        _start(paths, changes=[lr, seed])
    assert "optimizer.lr" not in str(refusal.value) and "run.resume_from" in str(refusal.value)
    assert _tree(paths.root) == before
    _start(paths, changes=[lr]).finish(Status.interrupted)
    assert _attempt(paths, 2)["changes"] == [
        {"path": "optimizer.lr", "old": 1e-4, "new": 1e-5, "on_resume": "warn"}
    ]


def test_a_second_process_is_refused_and_changes_nothing(paths: RunPaths) -> None:
    record = _start(paths)
    before = _tree(paths.root)
    with pytest.raises(RunLocked, match="in use by process"):
        _start(paths)
    assert _tree(paths.root) == before
    record.finish(Status.finished, step=10)


_KILLED = """
import os, sys
from pathlib import Path
from sdx.record.paths import RunPaths
from sdx.record.run import start
record = start(RunPaths(Path(sys.argv[1])), config_yaml="", config={}, overrides=[], resume="auto",
               max_steps=10)
record.begin(0)
record.progress(7)
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_reads_as_interrupted_and_its_attempt_is_closed(paths: RunPaths) -> None:
    subprocess.run([sys.executable, "-c", _KILLED, str(paths.root)], cwd=REPOSITORY)
    assert json.loads(paths.status.read_text())["status"] == "running"
    status = read_status(paths)
    assert status is not None and (status.status, status.step) == (Status.interrupted, 7)
    assert _attempt(paths, 1)["outcome"] is None
    record = _start(paths)
    assert record.attempt == 2
    first = _attempt(paths, 1)
    assert (first["outcome"], first["last_step"]) == ("interrupted", 7) and first["ended"]
    record.finish(Status.finished, step=10)


def test_a_process_that_lost_its_lock_writes_nothing_more(paths: RunPaths) -> None:
    record = _start(paths)
    record.lock.lost = True
    before = _tree(paths.root)
    record.finish(Status.failed)
    assert {**_tree(paths.root), "lock.json": b""} == {**before, "lock.json": b""}


def test_no_secret_reaches_the_folder(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", f"data.token={TOKEN}"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("CANARY", "canary-value")
    record = _start(
        paths,
        config_yaml=f"url: https://me:{TOKEN}@host/x\n",
        config={"token": TOKEN},
        overrides=[f"token={TOKEN}"],
        parent=f"https://me:{TOKEN}@host/run@5",
    )
    record.finish(Status.failed, reason=f"401 for Bearer {TOKEN}")
    for name, content in _tree(paths.root).items():
        assert TOKEN.encode() not in content, name
        assert b"canary-value" not in content or name.endswith(".patch"), name
    assert _run(paths)["parent"] == "https://REDACTED@host/run@5"


def test_record_imports_neither_jax_nor_numpy() -> None:
    script = (
        "import sys, sdx.record.run, sdx.record.metrics\n"
        "print([name for name in ('jax', 'numpy', 'omegaconf') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True)
    assert said.stdout.strip() == b"[]"
