"""What keeps jobs from running on TPUs, found before anything is asked for."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sdx.config.errors import Problem
from sdx.config.launching import TpuSettings
from sdx.config.schema import Cache, Platform
from sdx.record.store import as_path
from sdx_launchers.jobs import Job, LaunchError
from sdx_launchers.tpu.requests import missing_library, place_of, setting_problems
from sdx_launchers.tpu.ssh import ssh_problems

# Devices that JAX sees, by the number in the name: TensorCores of v4 and v5p, two a chip, are one
# device; those of v2 and v3 are two; v5litepod and v6e count chips (cloud.google.com/tpu/docs/v4
# and its siblings).
_NUMBERS_PER_DEVICE = {"v2": 1, "v3": 1, "v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}
# In a value of UserKnownHostsFile: ssh_config(5), TOKENS and ENVIRONMENT VARIABLES.
_SSH_READS = re.compile(r'[%"\\\x00-\x1f\x7f]|\$\{')


def all_problems(settings: TpuSettings, jobs: Sequence[Job]) -> Iterator[Problem]:
    """Of the settings, of each job, and of what the jobs must have in common."""
    faults = [*setting_problems(settings), *ssh_problems(settings), *_mount_problems(settings)]
    yield from faults
    if (problem := _library_problem()) is not None:
        yield problem
    elif settings.zone is not None and not faults:
        try:
            place_of(settings)
        except LaunchError as error:
            path, _, rule = str(error).partition("=null: ")
            yield Problem(path, "null", rule)
    for job in jobs:
        yield from _hardware_problems(settings, job)
        yield from _folder_problems(settings, job)
    if len({job.config.hardware.num_slices for job in jobs}) > 1:
        rule = "must be the same for all jobs of a sweep"
        yield Problem("hardware.num_slices", None, rule, "sweep over one kind of TPU at a time")


def _library_problem() -> Problem | None:
    try:
        import google.cloud.tpu_v2  # noqa: F401
    except ImportError as error:
        return Problem("hydra/launcher", "sdx_tpu", missing_library(error))
    return None


def _hardware_problems(settings: TpuSettings, job: Job) -> Iterator[Problem]:
    """A job that could not run on what is asked for."""
    hardware = job.config.hardware
    if hardware.platform is not Platform.tpu:
        fix = "use run_on=tpu_v4_32 and the like, which bring theirs"
        yield Problem("hardware", hardware.name, "is not a TPU", fix)
        return
    if hardware.num_devices is None:
        fix = "use a preset such as hardware=tpu_v4_32, or give its counts"
        yield Problem("hardware.num_devices", "null", "must be known before there is a TPU", fix)
    elif (found := _devices(settings)) is not None and not hardware.simulate:
        wanted, slices = hardware.num_devices, hardware.num_slices
        if found * slices != wanted:
            rule = (
                f"has {found} devices, hardware={hardware.name} wants {wanted} in {slices} of them"
            )
            fix = "use the same of both, as run_on=tpu_v4_32 does"
            yield Problem("hydra.launcher.accelerator_type", settings.accelerator_type, rule, fix)


def _devices(settings: TpuSettings) -> int | None:
    """Of one slice; None for names that are not known here."""
    match = re.fullmatch(r"(v\w+)-(\d+)", settings.accelerator_type or "")
    if match is None or match[1] not in _NUMBERS_PER_DEVICE:
        return None
    return int(match[2]) // _NUMBERS_PER_DEVICE[match[1]]


def _mount_problems(settings: TpuSettings) -> Iterator[Problem]:
    for mount in settings.mounts:
        if not Path(mount).is_absolute():
            yield Problem("hydra.launcher.mounts", mount, "must be an absolute path")
        elif not Path(mount).is_dir():
            rule = "is not here: status and metrics are read there"
            yield Problem("hydra.launcher.mounts", mount, rule, "mount it on this machine too")


def _folder_problems(settings: TpuSettings, job: Job) -> Iterator[Problem]:
    """Folders that would be another one on every worker."""
    run, data = job.config.run, job.config.data
    ways_out = "use gs://BUCKET/…, s3://BUCKET/…, or a folder below one of hydra.launcher.mounts"
    folder = str(job.folder)
    if not settings.ssh_command and _SSH_READS.search(folder):
        path = "run.name" if _SSH_READS.search(job.name) else "run.output_dir"
        rule = 'ssh notes keys of workers below it, and reads %, ", \\ and ${ as its own'
        yield Problem(path, repr(folder), rule, "use another name")
    if not _is_shared(run.output_dir, settings):
        rule = "is a local folder, and the workers of a TPU share no disk"
        yield Problem("run.output_dir", run.output_dir, rule, ways_out)
    if (job.command == "encode" or data.cache is not Cache.none) and not _is_shared(
        data.cache_dir, settings
    ):
        rule = "is a folder of each worker alone, which ends with the TPU"
        yield Problem("data.cache_dir", data.cache_dir, rule, ways_out)


def _is_shared(place: str, settings: TpuSettings) -> bool:
    path = as_path(place)
    if not isinstance(path, Path):
        return True
    return any(path.absolute().is_relative_to(mount) for mount in settings.mounts)
