"""Somebody at a login node of a cluster: commands typed in a folder, what became of their jobs."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.launchers.slurm_cluster import Cluster
from tests.launchers.source_tree import SourceTree
from tests.processes import Processes

STEPS, SAVED = 12, 4
HELD = {"SDX_TEST_HOLD": str(2 * SAVED - 1)}
"""Variables with which a job waits between its first checkpoint and the next one."""
MODEL = (
    "model.unet.block_out_channels=[8]",
    "model.unet.down_block_types=[CrossAttnDownBlock2D]",
    "model.unet.attention_head_dim=[2]",
    "model.unet.layers_per_block=1",
    "model.unet.norm_num_groups=2",
    "data.resolution=16",
    "data.num_examples=40",
    "train.per_device_batch_size=null",
    "train.global_batch_size=4",
    f"train.max_steps={STEPS}",
    "train.ema=false",
    "lr_schedule=constant",
    f"checkpoint.every={SAVED}",
    "metrics.every=1",
    "metrics.sinks=[jsonl]",
    "eval.every=null",
    "sample.every=null",
    "sample.num_adherence_prompts=null",
    "export.at_end=false",
    f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
)
SLURM = ("--multirun", "run_on=slurm", *MODEL, "hydra.launcher.poll_s=0.5")
TWO_NODES = ("hardware.num_devices=2", "hardware.num_hosts=2", "mesh.ici.data=2")
FOUR_PROCESSES = (
    "hardware.num_devices=4", "hardware.num_hosts=2", "mesh.ici.data=2", "mesh.ici.fsdp=2",
    "hydra.launcher.tasks_per_node=2",
)  # fmt: skip
_QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles in a third of the time
_DEADLINE_S = 900.0


@dataclass(frozen=True)
class Shell:
    """A folder where commands are typed, with the variables of the shell."""

    tree: SourceTree
    cluster: Cluster
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def typed(self, command: str, *arguments: str, **variables: str) -> Iterator[Processes]:
        """The running command; killed on leaving where it has not ended."""
        environment = _QUICK | self.cluster.environment | self.variables | variables
        process = self.tree.start(command, *arguments, where=self.folder, environment=environment)
        processes = Processes([process])
        try:
            yield processes
        finally:
            processes.end(0)

    def run(self, command: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """The command to its end: exit code and output."""
        with self.typed(command, *arguments, **variables) as processes:
            ended = processes.end(_DEADLINE_S)
        return ended.codes[0], ended.outputs[0]

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def launches(self) -> dict[str, dict[str, Any]]:
        """What was written down of each job that SLURM was handed, by the name of its run."""
        files = sorted(self.outputs.glob("launches/*/launch.json"))
        return {path.parent.name: json.loads(path.read_text()) for path in files}

    def run_of(self, override: str) -> str:
        """The name of the one run that `override` was typed for."""
        files = self.outputs.glob("launches/*/job.json")
        [found] = [p for p in files if override in json.loads(p.read_text())["overrides"]]
        return found.parent.name

    def id(self, run: str) -> str:
        return self.launches()[run]["id"]

    def rows(self, run: str) -> list[dict[str, Any]]:
        """What a run measured, without what depends on the clock; whole lines alone."""
        path = self.outputs / run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        kept = ("step", "loss", "grad_norm", "lr")
        return [{name: json.loads(line)[name] for name in kept} for line in lines]

    def status(self, run: str) -> str | None:
        path = self.outputs / run / "status.json"
        return json.loads(path.read_text())["status"] if path.exists() else None

    def attempts(self, run: str) -> list[dict[str, Any]]:
        """Every start of a run, oldest first."""
        files = (self.outputs / run / "attempts").glob("*.json")
        return [json.loads(path.read_text()) for path in sorted(files, key=lambda p: int(p.stem))]

    def log(self, run: str, task: int = 0) -> str:
        return Path(self.launches()[run]["logs"][task]).read_text(errors="replace")

    def wait_for_step(self, run: str, step: int) -> None:
        until(lambda: len(self.rows(run)) >= step, lambda: f"{run}: {self.log(run)}")

    def wait_until_held(self, run: str) -> None:
        """Until it waits after its first checkpoint, as with HELD; `go` lets it go on."""
        manifest = self.outputs / run / "checkpoints" / str(SAVED) / "manifest.json"
        until(manifest.exists, lambda: f"{run}: {self.log(run)}")
        self.wait_for_step(run, SAVED + 1)

    def go(self, run: str) -> None:
        (self.outputs / "launches" / run / "go").touch()

    def wait_for_end(self, run: str) -> None:
        """Until SLURM has done with its job."""
        until(lambda: self.id(run) not in self.cluster.queue(), lambda: self.log(run))


@dataclass(frozen=True)
class Typed:
    """A command that goes on, and the shell it was typed in."""

    shell: Shell
    processes: Processes

    def ended(self) -> tuple[int, str]:
        """Exit code and output, at its end."""
        ended = self.processes.end(_DEADLINE_S)
        return ended.codes[0], ended.outputs[0]

    def run_of(self, override: str) -> str:
        """The run that `override` was typed for, once its job was handed in."""
        until(lambda: override in self._handed_in(), lambda: self.processes.output(0))
        return self.shell.run_of(override)

    def _handed_in(self) -> list[str]:
        """Overrides of all jobs that have ids."""
        ids = {name: launch["id"] for name, launch in self.shell.launches().items()}
        files = [self.shell.outputs / "launches" / name / "job.json" for name in ids if ids[name]]
        return [text for path in files for text in json.loads(path.read_text())["overrides"]]


def until(is_so: Callable[[], object], said: Callable[[], str] = str) -> None:
    """Returns once `is_so`; AssertionError with what `said` tells where it never comes to that."""
    deadline = time.monotonic() + _DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


def tasks_of(job: str) -> dict[int, int]:
    """Process ids of sdx in a job that runs on this machine, by rank."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_text(errors="replace").split("\0")
            is_sdx = b"sdx.train" in (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        variables = {name: value for name, _, value in (word.partition("=") for word in words)}
        if is_sdx and _squeue_id(variables) == job:
            rank, pid = int(variables["SLURM_PROCID"]), int(folder.name)
            found[rank] = min(pid, found.get(rank, pid))  # its workers came later
    return found


def _squeue_id(variables: dict[str, str]) -> str | None:
    if "SLURM_PROCID" not in variables:
        return None
    if "SLURM_ARRAY_JOB_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables.get("SLURM_JOB_ID")


def begin_all(request: pytest.FixtureRequest, commands: Sequence[str]) -> None:
    """Sets up those of the fixtures `commands` that chosen tests of the module need, in order."""
    of_module = [item for item in request.session.items if item.path == request.path]
    needed = {name for item in of_module for name in getattr(item, "fixturenames", ())}
    for name in commands:
        if name in needed:
            request.getfixturevalue(name)
