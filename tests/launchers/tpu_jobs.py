"""Jobs for TPUs, and workers that are told how they end, for tests of the cloud's side."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sdx.config.compose import compose
from sdx.config.launching import TpuSettings
from sdx.config.schema import Config
from sdx.record.paths import RunPaths
from sdx.record.snapshot import Snapshot
from sdx_launchers.jobs import Job
from sdx_launchers.launch_record import write_job
from sdx_launchers.tpu.launcher import TpuLauncher
from sdx_launchers.tpu.remote_processes import RemoteEnd
from sdx_launchers.tpu.ssh import Host
from sdx_launchers.tpu.workers import Worker

FINISHED, INTERRUPTED = RemoteEnd(0), RemoteEnd(75)
FAILED = RemoteEnd(1, "worker 0: exit code 1: ValueError")
LOST = RemoteEnd(None, "worker 0: the connection was lost")


@cache
def tpu_config(*overrides: str) -> Config:
    """The tiny model on that hardware; a v4-32 where nothing else is said."""
    given = overrides if any("hardware=" in text for text in overrides) else ("hardware=tpu_v4_32",)
    return compose(["model=tiny", *given])


def make_job(root: Path, name: str = "a", config: Config | None = None, **more: Any) -> Job:
    """A job whose run lies below `root`, a mount of all workers, with its record written."""
    config = config or tpu_config()
    run = replace(config.run, output_dir=str(root), name=name)
    job = Job(
        name=name,
        command=more.get("command", "train"),
        config=replace(config, run=run),
        overrides=(),
        paths=RunPaths(root / name),
        folder=root / "launches" / name,
        sweep="a sweep",
    )
    write_job(job, "sdx_tpu")
    return job


def make_settings(endpoint: str | None, root: Path, **more: Any) -> TpuSettings:
    """Sound ones, which look often."""
    given = {
        "project": "a-project",
        "zone": "us-central2-b",
        "accelerator_type": "v4-32",
        "runtime_version": "tpu-ubuntu2204-base",
        "owner": "ann",
        "poll_s": 0.02,
        "mounts": [str(root)],
        "api_endpoint": endpoint,
    }
    return TpuSettings(**{**given, **more})


@dataclass
class Script:
    """What the workers of jobs do: `ends` are taken in turn, callables among them asked until they
    give one; `hosts` are those of each start, `argvs` what they ran."""

    ends: list[RemoteEnd | Callable[[], RemoteEnd | None]] = field(default_factory=list)
    hosts: list[tuple[Host, ...]] = field(default_factory=list)
    argvs: list[list[str]] = field(default_factory=list)
    prepare: Callable[[], None] = lambda: None
    stopped: int = 0

    def workers(self, hosts: Sequence[Host], settings: TpuSettings, folder: Path) -> "_Workers":
        return _Workers(self, tuple(hosts))


class _Workers:
    def __init__(self, script: Script, hosts: tuple[Host, ...]):
        self._script, self._hosts = script, hosts

    def prepare(self, snapshot: Snapshot) -> None:
        self._script.prepare()

    def start(self, name: str, argv_of: Any, folder: Path, **more: Any) -> "_Processes":
        self._script.hosts.append(self._hosts)
        root = Path("/home/ann/sdx")
        for number, host in enumerate(self._hosts):
            worker = Worker(host, root, "python", (root / "code",))  # type: ignore[arg-type]
            self._script.argvs.append(list(argv_of(worker, number)))
        return _Processes(self._script)

    def close(self) -> None:
        pass


class _Processes:
    def __init__(self, script: Script):
        self._script = script
        self._end = script.ends.pop(0) if script.ends else FINISHED
        self._is_stopped = threading.Event()

    def poll(self) -> RemoteEnd | None:
        if self._is_stopped.is_set():
            return INTERRUPTED
        return self._end if isinstance(self._end, RemoteEnd) else self._end()

    def stop(self) -> None:
        self._script.stopped += 1
        self._is_stopped.set()

    kill = stop


@contextmanager
def launching(settings: TpuSettings, script: Script | None = None) -> Iterator[TpuLauncher]:
    """A launcher whose workers follow `script`."""
    with TpuLauncher(settings, make_workers=(script or Script()).workers) as launcher:
        yield launcher
