"""Every key of the sweepers and launchers: `hydra.sweeper.*` and `hydra.launcher.*`.

Declared as the other keys are (schema.py); Hydra composes them beside a run's configuration, and no
run is saved with them. What spans several of them is checked where they are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from sdx.config.schema import option


class Provisioning(Enum):
    """How a TPU is paid for."""

    on_demand = "on_demand"
    spot = "spot"
    reserved = "reserved"


class SearchSampler(Enum):
    """How the next trial is chosen, by Optuna's names."""

    tpe = "tpe"
    random = "random"
    qmc = "qmc"


class Pruner(Enum):
    """Which trials end early, by Optuna's names."""

    none = "none"
    median = "median"
    hyperband = "hyperband"


@dataclass
class SweeperSettings:
    """hydra/sweeper=sdx: every combination of the values typed."""

    dry_run: bool = option(
        False, "Show what would be started, and how; start nothing.", identity=False
    )
    max_parallel: int | None = option(
        None,
        "Jobs at a time; null = one here, one TPU, all at once on SLURM (the array's throttle).",
        at_least=1,
        identity=False,
    )
    fail_fast: bool = option(
        False,
        "After the first failed job start no others and stop those that run; not detached.",
        identity=False,
    )
    retry_failed: bool = option(
        False, "Start jobs that failed before once more, from their checkpoint.", identity=False
    )
    objective: str = option(
        "validation_loss:min",
        "What jobs are judged by: METRIC, METRIC:min or METRIC:max, a column of metrics.jsonl.",
        identity=False,
    )
    name: str | None = option(
        None, "Folder of the sweep; null = model, data and a hash of its jobs.", identity=False
    )
    zip: list[str] = option(
        [],
        "Swept keys that change together, as [optimizer.lr+train.per_device_batch_size].",
        identity=False,
    )
    params: dict[str, str] = option(
        {}, "Keys and their values, as a named sweep writes them down.", identity=False
    )


@dataclass
class SearchSettings(SweeperSettings):
    """hydra/sweeper=sdx_search: values that Optuna chooses; needs sdx's extra `search`."""

    n_trials: int = option(
        20, "Trials in all, those of earlier starts included.", at_least=1, identity=False
    )
    sampler: SearchSampler = option(
        SearchSampler.tpe, "How the next values are chosen.", identity=False
    )
    n_startup_trials: int = option(
        5, "Trials before the sampler and the pruner begin to judge.", at_least=0, identity=False
    )
    pruner: Pruner = option(Pruner.median, "Which trials end early.", identity=False)
    pruning_warmup_steps: int = option(
        0, "No trial is pruned before this step.", unit="steps", at_least=0, identity=False
    )
    seed: int = option(0, "Of the sampler.", at_least=0, identity=False)


@dataclass
class LauncherSettings:
    """What every launcher takes."""

    python: str | None = option(
        None, "The Python that runs the jobs; null = this one.", identity=False
    )
    poll_s: float = option(
        2.0, "How often jobs are looked at.", unit="seconds", above=0, identity=False
    )


@dataclass
class LocalSettings(LauncherSettings):
    """hydra/launcher=sdx_local: processes of this machine."""

    pin: bool = option(
        True, "Give each job its own share of the cores and of the GPUs.", identity=False
    )


@dataclass
class SlurmSettings(LauncherSettings):
    """hydra/launcher=sdx_slurm: jobs and job arrays of a SLURM cluster."""

    poll_s: float = option(
        10.0, "How often jobs are looked at.", unit="seconds", above=0, identity=False
    )
    partition: str | None = option(None, "Partition; null = the cluster's default.", identity=False)
    account: str | None = option(None, "Account that pays; null = yours.", identity=False)
    qos: str | None = option(None, "Quality of service.", identity=False)
    nodes: int | None = option(
        None, "Nodes of one job; null = hardware.num_hosts.", at_least=1, identity=False
    )
    tasks_per_node: int = option(
        1, "Processes on a node; they share its GPUs.", at_least=1, identity=False
    )
    gpus_per_node: int | None = option(
        None, "GPUs of a node; null = those of the hardware preset.", at_least=0, identity=False
    )
    cpus_per_task: int | None = option(
        None, "Cores of a process; null = the cluster's default.", at_least=1, identity=False
    )
    mem_gib: float | None = option(
        None, "Memory of a node; null = the cluster's default.", unit="GiB", above=0, identity=False
    )
    timeout_min: int = option(
        60 * 24, "Time limit; a run that needs longer is requeued.", unit="minutes", at_least=1,
        identity=False,
    )  # fmt: skip
    constraint: str | None = option(None, "Features that nodes must have.", identity=False)
    exclusive: bool = option(False, "Whole nodes.", identity=False)
    additional_parameters: dict[str, str] = option(
        {}, "More #SBATCH lines, as {reservation: NAME}.", identity=False
    )
    srun_args: list[str] = option([], "More arguments of srun.", identity=False)
    setup: list[str] = option(
        [], "Shell lines before the job, as [module load cuda].", identity=False
    )
    command_prefix: list[str] = option(
        [], "Before the command, as [apptainer,exec,--nv,sdx.sif].", identity=False
    )
    signal_delay_s: int = option(
        120, "How long before its time limit a job saves and requeues.", unit="seconds",
        at_least=1, identity=False,
    )  # fmt: skip
    max_requeues: int = option(
        20, "Times a job goes on after a time limit or a preemption.", at_least=0, identity=False
    )
    retries: int = option(
        2, "Times a job goes on after a crash or a lost node.", at_least=0, identity=False
    )
    detach: bool = option(
        False, "Return after submission; the same command, or sdx.runs, collects.", identity=False
    )


@dataclass
class TpuSettings(LauncherSettings):
    """hydra/launcher=sdx_tpu: TPU VMs, made for the sweep and deleted after it."""

    poll_s: float = option(
        10.0, "How often TPUs and jobs are looked at.", unit="seconds", above=0, identity=False
    )
    project: str | None = option(
        None, "Google Cloud project; null = that of your credentials.", identity=False
    )
    zone: str | None = option(None, "Zone, as us-central2-b.", identity=False)
    accelerator_type: str | None = option(
        None, "One slice by Google's name, as v4-32.", identity=False
    )
    runtime_version: str | None = option(None, "Image of the TPU VMs.", identity=False)
    provisioning: Provisioning = option(
        Provisioning.on_demand, "on_demand, spot (cheaper, preempted) or reserved.", identity=False
    )
    reservation: str | None = option(None, "Reservation to take TPUs from.", identity=False)
    network: str | None = option(None, "VPC network; null = the project's default.", identity=False)
    subnetwork: str | None = option(None, "Subnetwork of it.", identity=False)
    external_ips: bool = option(True, "Give workers external addresses.", identity=False)
    service_account: str | None = option(
        None, "Service account of the workers; null = the project's default.", identity=False
    )
    startup_timeout_min: float = option(
        120.0, "How long a TPU may take to come.", unit="minutes", above=0, identity=False
    )
    retries: int = option(
        10, "Times a job goes on after its TPU was preempted or lost.", at_least=0, identity=False
    )
    keep: bool = option(
        False, "Leave the TPUs for the next sweep instead of deleting them.", identity=False
    )
    owner: str | None = option(
        None, "Label of whose TPUs these are; null = your user name.", identity=False
    )
    lease_min: float = option(
        10.0, "A TPU whose launcher gave no sign of life for so long is a stray.",
        unit="minutes", above=0, identity=False,
    )  # fmt: skip
    self_delete_min: float | None = option(
        7 * 24.0 * 60, "A TPU deletes itself after so long, whatever happens to the launcher.",
        unit="minutes", above=0, identity=False,
    )  # fmt: skip
    api_endpoint: str | None = option(
        None, "HOST:PORT of an emulator of the TPU API, without TLS.", identity=False
    )
    ssh_user: str | None = option(None, "User on the workers; null = yours.", identity=False)
    ssh_key: str | None = option(None, "Private key; null = ssh's own choice.", identity=False)
    ssh_port: int = option(22, "Port of sshd on the workers.", at_least=1, identity=False)
    ssh_command: list[str] = option(
        [],
        "Instead of ssh, with {node}, {zone}, {project}, {worker}, {host}, {command}; "
        "as gcloud's, for IAP.",
        identity=False,
    )
    mounts: list[str] = option(
        [],
        "Folders that every worker and this machine have as the same mount; run.output_dir may lie "
        "below one.",
        identity=False,
    )
    remote_dir: str = option(
        "sdx", "Folder on the workers, below the home folder unless absolute.", identity=False
    )
    setup: list[str] = option(
        [], "Shell lines on each worker before sdx is installed.", identity=False
    )
    environment: list[str] = option(
        [],
        "Variables that jobs get from here, as [HF_TOKEN]; over ssh, never in a file.",
        identity=False,
    )
    install: str | None = option(
        None,
        "Shell line that makes {python} run what is in {snapshot}; null = a venv with sdx[tpu].",
        identity=False,
    )


SWEEPERS: dict[str, type[SweeperSettings]] = {"sdx": SweeperSettings, "sdx_search": SearchSettings}
LAUNCHERS: dict[str, type[LauncherSettings]] = {
    "sdx_local": LocalSettings,
    "sdx_slurm": SlurmSettings,
    "sdx_tpu": TpuSettings,
}
"""Options of hydra/sweeper and hydra/launcher, with their keys."""
OPTIONS: dict[str, Mapping[str, type]] = {"sweeper": SWEEPERS, "launcher": LAUNCHERS}
