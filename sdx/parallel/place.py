"""Which process of how many this one is, as its surroundings say it; no JAX, nothing is started.

Keys of `distributed.*` come first, then JAX's variables, SLURM's, and the metadata of a TPU.
SLURM's variables: sched.md/srun.html, "output environment variables".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sdx.config.schema import DistributedConfig, HardwareConfig, Platform

Environment = Mapping[str, str]

_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_TPU = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES")
_FIRST_PORT, _NUM_PORTS = 61440, 4096  # above what Linux gives to other programs, 32768-60999


class ProcessesError(ValueError):
    """The processes found are not those that `hardware` needs."""


@dataclass(frozen=True)
class Place:
    """This process among those of its run."""

    source: str
    """Where that was found, for messages."""
    coordinator_address: str
    """HOST:PORT where process 0 listens."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """GPUs of this process, of those it sees; None = all of them."""


def find_place(
    distributed: DistributedConfig,
    hardware: HardwareConfig,
    environment: Environment,
    *,
    tpu_place: Callable[[], Place | None] = lambda: None,
) -> Place | None:
    """This process's place, None where it is alone; `tpu_place` asks the metadata of a TPU.

    Raises ProcessesError where `hardware` needs other processes than those.
    """
    place = _given(distributed) or _from_jax(environment) or _from_slurm(hardware, environment)
    if place is None and hardware.platform is Platform.tpu and not hardware.simulate:
        place = tpu_place()
    if place is None and distributed.coordinator_address is not None:
        raise ProcessesError(
            f"distributed.coordinator_address={distributed.coordinator_address}: nothing says how "
            f"many processes there are ({_seen(environment)}); add distributed.num_processes and "
            "distributed.process_id."
        )
    if place is not None and distributed.coordinator_address is not None:
        place = replace(place, coordinator_address=distributed.coordinator_address)
    _check(place, hardware, environment)
    return place if place is not None and place.num_processes > 1 else None


def _given(distributed: DistributedConfig) -> Place | None:
    address = distributed.coordinator_address
    count, number = distributed.num_processes, distributed.process_id
    if address is None or count is None or number is None:
        return None
    return Place("distributed.*", address, count, number)


def _from_jax(environment: Environment) -> Place | None:
    """JAX itself reads the first variable; the others are what Orbax and its launchers set."""
    if not all(name in environment for name in _JAX):
        return None
    address, count, number = (environment[name] for name in _JAX)
    count, number = _whole(environment, _JAX[1]), _whole(environment, _JAX[2])
    return Place("JAX's variables", address, count, number)


def _from_slurm(hardware: HardwareConfig, environment: Environment) -> Place | None:
    """Only within srun: the variables of a task are not all there in the script of a job."""
    if not all(name in environment for name in _SLURM):
        return None
    number, local = _whole(environment, "SLURM_PROCID"), _whole(environment, "SLURM_LOCALID")
    steps = "SLURM_STEP_NUM_TASKS"  # SLURM_NTASKS may be that of the whole job
    count = _whole(environment, steps if steps in environment else "SLURM_NTASKS")
    host = _first_host(environment["SLURM_STEP_NODELIST"])
    return Place(
        "SLURM",
        environment.get("JAX_COORDINATOR_ADDRESS", f"{host}:{_slurm_port(environment)}"),
        count,
        number,
        _slurm_gpus(hardware, environment, count, local),
    )


def _first_host(nodes: str) -> str:
    """The first name of a list such as `gpu[007-010,012],login1`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise ProcessesError(f"SLURM_STEP_NODELIST={nodes}: not a list of nodes.")
    return match[1] + (match[2] or "")


def _slurm_port(environment: Environment) -> str:
    """The same in every task of a step, another in other steps."""
    if "JAX_COORDINATOR_PORT" in environment:
        return environment["JAX_COORDINATOR_PORT"]
    step = environment.get("SLURM_STEP_ID", "0")
    number = _whole(environment, "SLURM_JOB_ID") + 61 * (int(step) if step.isdigit() else 0)
    return str(_FIRST_PORT + number % _NUM_PORTS)


def _slurm_gpus(
    hardware: HardwareConfig, environment: Environment, num_processes: int, local: int
) -> tuple[int, ...] | None:
    """GPUs of a task: all it sees where it is alone on its node or SLURM gave it its own, else its
    share of those the tasks of the node see."""
    tasks = _tasks_on_node(environment)
    if hardware.platform is not Platform.gpu or tasks == 1 or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = None if visible is None else len([name for name in visible.split(",") if name])
    share = 1
    if hardware.num_devices is not None and hardware.num_devices % num_processes == 0:
        share = hardware.num_devices // num_processes
    elif seen is not None and seen % tasks == 0:
        share = seen // tasks
    if seen is not None and seen <= share:  # srun --gpus-per-task
        return None
    return tuple(range(local * share, (local + 1) * share))


def _tasks_on_node(environment: Environment) -> int:
    """From a list such as `8(x3),4`, one number for each node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text or ""):
        counts += [int(tasks)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 1


def _whole(environment: Environment, name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ProcessesError(f"{name}={environment[name]}: must be a whole number.") from None


def _check(place: Place | None, hardware: HardwareConfig, environment: Environment) -> None:
    if place is None or place.num_processes == 1:
        if hardware.num_hosts > 1 and not hardware.simulate:
            raise ProcessesError(_lonely(place, hardware, environment))
        return
    count, hosts, devices = place.num_processes, hardware.num_hosts, hardware.num_devices
    if not 0 <= place.process_id < count:
        raise ProcessesError(
            f"{place.source}: process {place.process_id} of {count}; processes are numbered from 0 "
            f"to {count - 1}."
        )
    if hardware.platform is Platform.tpu and devices is not None and count != hosts:
        wanted: Sequence[int] = [hosts]
    elif devices is None:
        return
    else:
        wanted = [n for n in range(hosts, devices + 1, hosts) if devices % n == 0]
    if count not in wanted:
        allowed = ", ".join(map(str, wanted))
        raise ProcessesError(
            f"hardware={hardware.name}: {count} processes were found ({place.source}), its "
            f"num_devices={devices} and num_hosts={hosts} take {allowed}; start so many, or pick "
            "the hardware=... of this machine."
        )


def _lonely(place: Place | None, hardware: HardwareConfig, environment: Environment) -> str:
    name, hosts = hardware.name, hardware.num_hosts
    found = "no sign of other processes" if place is None else f"one process ({place.source})"
    srun = ""
    if "SLURM_JOB_ID" in environment and place is None:
        srun = f" In a SLURM job: srun --ntasks={hosts} --ntasks-per-node=1 before the command."
    return (
        f"hardware.num_hosts={hosts}: hardware={name} is {hosts} hosts with a process each, found "
        f"{found} ({_seen(environment)}).\n"
        "allowed: the same command on every host, started by srun, on the workers of a TPU, or "
        "with distributed.{coordinator_address,num_processes,process_id}.\n"
        f"fix: `python -m sdx.plan hardware={name} ...` says whether it would fit there, "
        "hardware.simulate=true rehearses it here, run_on=... starts it there (docs/slurm.md, "
        f"docs/tpu.md).{srun}"
    )


def _seen(environment: Environment) -> str:
    """Names of variables only: values may be addresses that are nobody's business."""
    names = [name for name in (*_JAX, *_SLURM, *_TPU) if name in environment]
    return "variables seen: " + (", ".join(names) or "none")
