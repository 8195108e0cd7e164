"""hydra/launcher=sdx_tpu: jobs on TPU VMs, asked for as queued resources and deleted afterwards.

What is asked of Google is in tpu/requests.py and tpu/client.py, the TPUs of a sweep in tpu/pool.py,
a job on them in tpu/run.py, its processes there in workers.py, what was left behind in
tpu/strays.py.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from sdx.config.errors import Problem
from sdx.config.launching import TpuSettings
from sdx.record.launched import PATIENCE_S
from sdx.record.lock import is_held
from sdx.record.owner import Owner, lives_here
from sdx.record.snapshot import Snapshot, take_snapshot
from sdx.record.status import Status, read_status
from sdx_launchers.jobs import Ended, Job
from sdx_launchers.launch_record import SNAPSHOTS, read_outcome, record_root
from sdx_launchers.sweep.stop_signals import unstoppable
from sdx_launchers.tpu.checks import all_problems
from sdx_launchers.tpu.client import Tpus
from sdx_launchers.tpu.pool import DELETING, Pool, say
from sdx_launchers.tpu.requests import (
    Spec,
    creation,
    deletion,
    example_name,
    labels,
    owner_of,
    place_of,
    spec_of,
)
from sdx_launchers.tpu.run import TpuRun, tpu_folder, worker_argv
from sdx_launchers.tpu.ssh import Host, ssh_argv
from sdx_launchers.tpu.strays import sweep_up
from sdx_launchers.tpu.workers import Worker, Workers


class TpuLauncher:
    """All TPUs of a sweep; `client` and `make_workers` are Google's API and the way to the workers,
    where they are to be others."""

    parallel = 1
    takes_all = False
    outlives_driver = False
    detach = False

    def __init__(self, settings: TpuSettings, *, client: Any = None, make_workers: Any = Workers):
        self.poll_s = settings.poll_s
        self._settings = settings
        self._client = client
        self._make_workers = make_workers
        self._runs: list[TpuRun] = []
        self._pool: Pool | None = None
        self._snapshot: Snapshot | None = None
        self._stack = ExitStack()

    def problems(self, jobs: Sequence[Job], max_parallel: int | None) -> list[Problem]:
        return list(dict.fromkeys(all_problems(self._settings, jobs)))

    def describe(self, jobs: Sequence[Job], max_parallel: int | None) -> str:
        """The requests that make and delete a TPU, and for each job the command on each worker; the
        last characters of the name are drawn, the lease is set, when it is asked for."""
        if not jobs:
            return "No TPU is needed."
        settings, spec = self._resolved(), _spec(self._settings, jobs)
        place, owner = place_of(settings), owner_of(settings)
        name = example_name(owner)
        labelled = labels(owner, jobs[0].sweep, 16 * "x", 0, shape=spec.shape, keep=settings.keep)
        lasts_s = 60 * (settings.startup_timeout_min + settings.lease_min)
        most = min(max_parallel or self.parallel, len(jobs))
        return "\n".join(
            [
                f"Up to {most} of these at a time, each used by one job after the other.",
                f"CreateQueuedResource {_json(creation(place, name, spec, labelled, lasts_s))}",
                *(line for job in jobs for line in self._commands(job, spec, name)),
                "left for the next sweep (keep=true)"
                if settings.keep
                else f"DeleteQueuedResource {_json(deletion(place, name))}",
            ]
        )

    def start(self, jobs: Sequence[Job], max_parallel: int | None) -> Sequence[TpuRun]:
        settings = self._resolved()
        if self._pool is None:
            tpus = Tpus(place_of(settings), settings.poll_s, self._client)
            pool = Pool(tpus, settings, _spec(settings, jobs), jobs[0].sweep)
            self._pool = self._stack.enter_context(pool)
        snapshot = self._taken(jobs[0])
        limit = max_parallel or self.parallel
        runs = [
            TpuRun(job, settings, self._pool, snapshot, limit, self._make_workers) for job in jobs
        ]
        for run in runs:
            run.begin()
        self._runs += runs
        return runs

    def attach(self, job: Job, launch: Mapping[str, Any]) -> "_Elsewhere | None":
        """A job of a launcher that lives, here or elsewhere. One whose launcher is dead has lost
        its TPU by the time this one starts, and is started again."""
        process = launch.get("process")
        elsewhere = _Elsewhere(job, None if process is None else Owner(**process))
        return elsewhere if elsewhere.is_alive() else None

    def __enter__(self) -> "TpuLauncher":
        found = sweep_up(self._resolved(), kept=False, connect=self._connect)
        found.in_use.clear()
        if found.deleted or found.kept or found.faults:
            say(str(found))
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack:
            running = [run for run in self._runs if run.poll() is None]
            try:
                for run in running:
                    run.stop()
                deadline = time.monotonic() + PATIENCE_S
                for run in running:
                    run.join(max(0.0, deadline - time.monotonic()))
            finally:
                with unstoppable(DELETING):  # runs may be making or deleting some
                    for run in running:
                        run.stop()
                    for run in running:
                        run.join()

    def _connect(self, place: Any) -> Tpus:
        return Tpus(place, self._settings.poll_s, self._client)

    def _resolved(self) -> TpuSettings:
        """With the project that the credentials name, and whose the TPUs are."""
        project, owner = place_of(self._settings).project, owner_of(self._settings)
        return replace(self._settings, project=project, owner=owner)

    def _taken(self, job: Job) -> Snapshot:
        if self._snapshot is None:
            self._snapshot = take_snapshot(record_root(job.config) / SNAPSHOTS)
        return self._snapshot

    def _commands(self, job: Job, spec: Spec, name: str) -> list[str]:
        """The command of each worker, as its shell gets it."""
        settings, hardware = self._resolved(), job.config.hardware
        root = PurePosixPath(settings.remote_dir)
        code = root / "snapshots" / "DIGEST"
        per_slice = max(1, hardware.num_hosts // spec.num_slices)
        hosts = [
            Host(node, number, f"ADDRESS-{slice * per_slice + number}")
            for slice, node in enumerate(spec.node_ids(name))
            for number in range(per_slice)
        ]
        python = settings.python or str(root / "envs" / "KEY" / "bin" / "python")
        known_hosts = tpu_folder(job, name) / "known_hosts"
        lines = [
            f"{job.name}: {settings.remote_dir}/snapshots/DIGEST is copied and installed, then"
        ]
        for number, host in enumerate(hosts):
            worker = Worker(host, root, python, (code, code / "launchers"))
            command = shlex.join(worker_argv(job, hosts[0], worker, number))
            lines.append(shlex.join(ssh_argv(settings, host, command, known_hosts)))
        return lines


def _spec(settings: TpuSettings, jobs: Sequence[Job]) -> Spec:
    return spec_of(settings, jobs[0].config.hardware.num_slices)


def _json(request: Mapping[str, Any]) -> str:
    return json.dumps(request, indent=2)


class _Elsewhere:
    """A job that another launcher runs: its lock tells."""

    def __init__(self, job: Job, launcher: Owner | None):
        self.job = job
        self.id = "elsewhere"
        self._launcher = launcher

    def is_alive(self) -> bool:
        if read_outcome(self.job.folder) is not None:
            return False
        lives = None if self._launcher is None else lives_here(self._launcher)
        if lives is not None:
            return lives
        return self.job.command == "train" and is_held(self.job.paths.lock)

    def poll(self) -> Ended | None:
        if self.is_alive():
            return None
        status = read_status(self.job.paths) if self.job.command == "train" else None
        if status is None:
            return Ended(Status.interrupted, "its launcher ended")
        return Ended(status.status, status.reason)

    def stop(self) -> None:
        """Its own launcher is the one to ask."""
