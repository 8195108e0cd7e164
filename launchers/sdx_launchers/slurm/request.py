"""What one job asks a SLURM cluster for, and what must hold before anything of it is a script.

Names reach a script quoted, and only if they look like names: `#SBATCH` lines end at a newline, and
a value that begins with a dash would be another option.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdx.config.errors import Problem
from sdx.config.launching import SlurmSettings
from sdx.config.schema import Config, HardwareConfig, Platform
from sdx_launchers.jobs import Job

_LAUNCHER = "hydra.launcher"
_NAME = r"\w[\w.@+-]*"
_PATTERNS = {
    "partition": (rf"{_NAME}(,{_NAME})*", "names, with commas between them"),
    "account": (_NAME, "a name"),
    "qos": (_NAME, "a name"),
    "constraint": (r"[\w\[(][\w.,:=|&*()\[\]-]*", "features, as a100|h100, without spaces"),
}
_OPTION = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f]*")
_OURS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "nodes": "nodes",
    "ntasks": "tasks_per_node",
    "ntasks-per-core": "tasks_per_node",
    "ntasks-per-gpu": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "ntasks-per-socket": "tasks_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-socket": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "cpus-per-gpu": "cpus_per_task",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem_gib",
    "mem-per-cpu": "mem_gib",
    "mem-per-gpu": "mem_gib",
    "time": "timeout_min",
    "constraint": "constraint",
    "exclusive": "exclusive",
    "signal": "signal_delay_s",
}
"""Options of sbatch, and the keys that stand for them or for what they would contradict."""
_FIXED = ("array", "error", "hold", "job-name", "no-requeue", "open-mode", "output", "requeue")


@dataclass(frozen=True)
class Request:
    """Jobs with the same one can be elements of one array."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    """0: none are asked for."""


def request_of(settings: SlurmSettings, hardware: HardwareConfig) -> Request:
    """What `settings` say, and where they say nothing, what the hardware preset has.

    A rehearsal (hardware.simulate) is one process without GPUs.
    """
    tasks = settings.tasks_per_node
    if hardware.simulate:
        return Request(settings.nodes or 1, tasks, settings.gpus_per_node or 0)
    nodes = settings.nodes or hardware.num_hosts
    gpus = settings.gpus_per_node
    if gpus is None:
        is_known = hardware.platform is Platform.gpu and hardware.num_devices is not None
        gpus = (hardware.num_devices or 0) // nodes if is_known else 0
    return Request(nodes, tasks, gpus)


def settings_problems(settings: SlurmSettings) -> Iterator[Problem]:
    """Values that would not be what they are named for in a script."""
    for key, (pattern, allowed) in _PATTERNS.items():
        value = getattr(settings, key)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            yield Problem(f"{_LAUNCHER}.{key}", repr(value), f"must be {allowed}")
    for option, value in settings.additional_parameters.items():
        yield from _additional(option, value)
    if settings.gpus_per_node != 0 and (gres := _gpus_by_gres(settings)) is not None:
        rule = "asks for GPUs, as hydra.launcher.gpus_per_node and hardware do"
        fix = "leave it out, or add hydra.launcher.gpus_per_node=0 where the cluster knows no other"
        yield Problem(f"{_LAUNCHER}.additional_parameters.gres", repr(gres), rule, fix)
    for argument in settings.srun_args:
        if not argument.startswith("-") or not _PRINTABLE.fullmatch(argument):
            rule = "must be options on one line, srun takes the first other word for a command"
            fix = "write --NAME=VALUE"
            yield Problem(f"{_LAUNCHER}.srun_args", repr(argument), rule, fix)
    for key, lines in (("setup", settings.setup), ("command_prefix", settings.command_prefix)):
        for line in lines:
            if not _PRINTABLE.fullmatch(line):
                yield Problem(f"{_LAUNCHER}.{key}", repr(line), "must be one line each")
    if settings.command_prefix and settings.command_prefix[0].startswith("-"):
        got = settings.command_prefix[0]
        yield Problem(f"{_LAUNCHER}.command_prefix", repr(got), "must begin with a program")
    if settings.signal_delay_s >= 60 * settings.timeout_min:
        rule = f"must be below the time limit, hydra.launcher.timeout_min={settings.timeout_min}"
        yield Problem(f"{_LAUNCHER}.signal_delay_s", str(settings.signal_delay_s), rule)


def _additional(option: str, value: str) -> Iterator[Problem]:
    path, name = f"{_LAUNCHER}.additional_parameters", option.replace("_", "-")
    if not _OPTION.fullmatch(option):
        rule = "must be the name of an option of sbatch, without dashes before it"
        yield Problem(path, repr(option), rule)
    elif name in _OURS:
        yield Problem(path, option, "is said by a key of its own", f"use {_LAUNCHER}.{_OURS[name]}")
    elif name in _FIXED:
        yield Problem(path, option, "is sdx's own", "leave it out")
    if not _PRINTABLE.fullmatch(str(value)):
        yield Problem(f"{path}.{option}", repr(value), "must be one line")


def _gpus_by_gres(settings: SlurmSettings) -> str | None:
    """What is asked for by the older way to GPUs, as `gpu:a100:8`; other resources are none."""
    gres = str(settings.additional_parameters.get("gres", ""))
    kinds = {part.strip().partition(":")[0] for part in gres.split(",")}
    return gres if kinds & {"gpu", "gres/gpu"} else None


def job_problems(settings: SlurmSettings, jobs: Sequence[Job]) -> Iterator[Problem]:
    """Hardware that no such job has, and folders that SLURM would misread; of all jobs, once."""
    for job in jobs:
        for rule in (_platform, _counts, _processes):
            yield from rule(settings, job.config)
        folder = str(job.folder)
        if "%" in folder or "\\" in folder or not _PRINTABLE.fullmatch(folder):
            rule = "SLURM reads % and \\ in names of logs as its own, and lines end there"
            yield Problem("run.output_dir", repr(folder), rule, "use another folder")


def pace_problems(
    settings: SlurmSettings, jobs: Sequence[Job], max_parallel: int | None
) -> Iterator[Problem]:
    """A limit that SLURM cannot keep to: it is one of each array."""
    count = len({request_of(settings, job.config.hardware) for job in jobs})
    if count > 1 and max_parallel is not None:
        rule = f"jobs on different hardware are {count} arrays with limits of their own"
        fix = "leave it out, or sweep each hardware for itself"
        yield Problem("hydra.sweeper.max_parallel", str(max_parallel), rule, fix)


def _platform(settings: SlurmSettings, config: Config) -> Iterator[Problem]:
    hardware = config.hardware
    if hardware.platform is Platform.tpu and not hardware.simulate:
        rule = "is of TPUs, run_on=slurm has GPUs and CPUs"
        yield Problem("hardware", hardware.name, rule, "use run_on=tpu_..., or another hardware")


def _counts(settings: SlurmSettings, config: Config) -> Iterator[Problem]:
    hardware, request = config.hardware, request_of(settings, config.hardware)
    if hardware.platform is not Platform.gpu or hardware.simulate:
        return
    if settings.gpus_per_node == 0 and _gpus_by_gres(settings) is not None:
        return  # how many these are, the job itself compares with the hardware
    gpus, devices = request.gpus_per_node, hardware.num_devices
    path = f"{_LAUNCHER}.gpus_per_node"
    if devices is None and settings.gpus_per_node is None:
        rule = f"missing, hardware={hardware.name} does not say how many devices it has"
        yield Problem(path, "null", rule, "give it, or a preset such as hardware=gpu_a100_8")
    elif devices is not None and devices % request.nodes:
        rule = f"must divide hardware.num_devices={devices}"
        yield Problem(f"{_LAUNCHER}.nodes", str(request.nodes), rule)
    elif devices is not None and gpus * request.nodes != devices:
        rule = f"times {request.nodes} nodes must be hardware.num_devices={devices}"
        yield Problem(path, str(gpus), rule, "leave it out, or pick the preset of these nodes")


def _processes(settings: SlurmSettings, config: Config) -> Iterator[Problem]:
    """As the processes themselves check it when they find each other (parallel/place.py)."""
    hardware, request = config.hardware, request_of(settings, config.hardware)
    count, hosts = request.nodes * request.tasks_per_node, hardware.num_hosts
    devices = 1 if hardware.simulate else hardware.num_devices
    if hardware.simulate:
        hosts = 1
    if devices is None:
        return
    wanted = [number for number in range(hosts, devices + 1, hosts) if devices % number == 0]
    if count not in wanted:
        got = f"{request.tasks_per_node} with {_LAUNCHER}.nodes={request.nodes}"
        allowed = ", ".join(map(str, wanted))
        rule = f"makes {count} processes, hardware={hardware.name} takes {allowed}"
        fix = f"hardware.num_devices={hardware.num_devices}, num_hosts={hardware.num_hosts} say so"
        yield Problem(f"{_LAUNCHER}.tasks_per_node", got, rule, fix)
