"""Records of runs and sweeps as sdx writes them, without any training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sdx.config.schema import Config
from sdx.record.files import write_json
from sdx.record.paths import RunPaths
from sdx.record.status import Status, write_status
from sdx.record.store import AnyPath
from sdx_launchers.jobs import Job
from sdx_launchers.sweep.folder import write_manifest

CONFIG: dict[str, Any] = {
    "model.name": "tiny",
    "model.unet.sample_size": 8,
    "optimizer.kind": "adamw",
    "optimizer.lr": 1e-3,
    "train.max_steps": 4,
}


def make_run(
    place: AnyPath,
    name: str,
    *,
    status: Status = Status.finished,
    reason: str | None = None,
    config: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    losses: Sequence[float | None] = (0.5, 0.4, 0.3, 0.2),
    validation: Mapping[int, float | None] | None = None,
    attempts: Sequence[tuple[str, str | None]] = (("12:00:00", "12:01:30"),),
    **record: Any,
) -> RunPaths[Any]:
    """A run at `place`/`name`; `config` is laid over CONFIG."""
    paths = RunPaths[Any](place / name)
    if isinstance(paths.root, Path):
        paths.attempts.mkdir(parents=True)
    fields = {"created": "2026-11-22T12:00:00Z", "overrides": list(overrides)}
    fields["config"] = {**CONFIG, **(config or {})}
    write_json(paths.run, fields | record)
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    for step, loss in (validation or {}).items():
        rows.append({"step": step, "validation_loss": loss})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if isinstance(paths.root, Path):
        paths.metrics.write_text(text)
    else:
        (paths.metrics.with_suffix("") / "000001.jsonl").write_bytes(text.encode())
    for number, (started, ended) in enumerate(attempts, start=1):
        day = "2026-11-22T"
        spans = {"started": f"{day}{started}Z", "ended": ended and f"{day}{ended}Z"}
        write_json(paths.attempts / f"{number}.json", {**spans, "host": "node1", "scheduler": {}})
    write_status(paths, status, step=len(losses), reason=reason)
    return paths


def make_job(outputs: Path, name: str, sweep: str = "lrs", overrides: Sequence[str] = ()) -> Job:
    """A job without a configuration."""
    paths = RunPaths[Any](outputs / name)
    folder = outputs / "launches" / name
    return Job(name, "train", cast(Config, None), tuple(overrides), paths, folder, sweep)


def make_sweep(
    outputs: Path,
    jobs: Mapping[str, Sequence[str]],
    *,
    sweep: str = "lrs",
    objective: str = "validation_loss:min",
) -> Path:
    """A sweep's folder with its list of jobs: overrides by name."""
    made = [make_job(outputs, name, sweep, overrides) for name, overrides in jobs.items()]
    folder = outputs / "sweeps" / sweep
    write_manifest(folder, made, command="train", objective=objective)
    return folder


def launched(job: Job, launcher: str = "sdx_slurm", id: str = "7", **fields: Any) -> None:
    """What a sweep and its launcher write when they hand a job over."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(
        job.folder / "job.json",
        {
            "sweep": job.sweep,
            "launcher": launcher,
            "command": job.command,
            "name": job.name,
            "run": str(job.paths.root),
            "overrides": list(job.overrides),
        },
    )
    launch = {"launcher": launcher, "id": id, "submitted": "2026-01-01T00:00:00Z", **fields}
    write_json(job.folder / "launch.json", launch)
