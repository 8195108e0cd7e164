"""Rules of `hardware.*` and `xla.*`: counts that fit each other, and flags for the platform."""

import re
from collections.abc import Callable, Iterator

from sdx.config.errors import Problem
from sdx.config.leaves import spelled
from sdx.config.schema import Config, Platform

FLAG = re.compile(r"--(\w+)=\S+")
"""A compiler flag, and its name."""
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}")
_TOPOLOGY = re.compile(r"\w+:(\d+(?:x\d+){1,2})")
_LIBTPU = ("xla_tpu_", "xla_jf_", "xla_sc_")  # in XLA_FLAGS they end the process, even on a TPU


def _runs_on(platform: Platform) -> Callable[[Config], bool]:
    def condition(config: Config) -> bool:
        return config.hardware.platform is platform and not config.hardware.simulate

    return condition


def _is_described(config: Config) -> bool:
    return config.hardware.topology is not None


NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "hardware.chip_config": (_is_described, "hardware.topology"),
    "hardware.chips_per_host": (_is_described, "hardware.topology"),
    "xla.libtpu_args": (_runs_on(Platform.tpu), "a TPU, and hardware.simulate=false"),
    "xla.memory_fraction": (_runs_on(Platform.gpu), "GPUs, and hardware.simulate=false"),
}


def hardware_problems(config: Config) -> Iterator[Problem]:
    """Counts and descriptions that cannot be, and flags that no compiler here would take."""
    yield from _counts(config)
    yield from _tpu_alone(config)
    yield from _topology(config)
    yield from _flags(config)
    yield from _processes(config)
    yield from _rehearsal(config)


def _counts(config: Config) -> Iterator[Problem]:
    hardware = config.hardware
    devices, hosts, slices = hardware.num_devices, hardware.num_hosts, hardware.num_slices
    if min(hosts, slices) < 1:
        return  # the bounds say so
    if devices is not None and devices % hosts:
        rule = f"must be a multiple of hardware.num_hosts={hosts}"
        yield Problem("hardware.num_devices", str(devices), rule)
    if hosts % slices:
        rule = f"must be a multiple of hardware.num_slices={slices}, each has whole hosts"
        yield Problem("hardware.num_hosts", str(hosts), rule)


def _tpu_alone(config: Config) -> Iterator[Problem]:
    hardware = config.hardware
    if hardware.platform is Platform.tpu:
        return
    rule = f"is of TPUs, hardware={hardware.name} is {hardware.platform.name}"
    if hardware.num_slices > 1:
        yield Problem("hardware.num_slices", str(hardware.num_slices), rule, "use num_hosts")
    if hardware.topology is not None:
        yield Problem("hardware.topology", hardware.topology, rule, "leave it out")


def _topology(config: Config) -> Iterator[Problem]:
    topology, per_host = config.hardware.topology, config.hardware.chips_per_host
    if topology is None:
        return
    match = _TOPOLOGY.fullmatch(topology)
    if match is None:
        rule = "must be a generation and the chips in each dimension"
        yield Problem("hardware.topology", topology, rule, "v4:2x2x4 or v5e:4x8, for instance")
        return
    dimensions = [int(size) for size in match[1].split("x")]
    if per_host is not None and not _divides(per_host, dimensions):
        rule = f"must be three numbers that divide those of hardware.topology={topology}"
        fix = "a missing third one is 1: [2,4,1] for v5e:2x4"
        yield Problem("hardware.chips_per_host", spelled(per_host), rule, fix)


def _divides(per_host: list[int], dimensions: list[int]) -> bool:
    sizes = [*dimensions, 1][:3]
    return len(per_host) == 3 and all(
        part > 0 and whole % part == 0 for part, whole in zip(per_host, sizes, strict=True)
    )


def _flags(config: Config) -> Iterator[Problem]:
    platform, name = config.hardware.platform, config.hardware.name
    for path, flags in {
        "xla.flags": config.xla.flags,
        "xla.libtpu_args": config.xla.libtpu_args,
    }.items():
        yield from _spelling(path, flags)
    for flag in config.xla.flags:
        known = flag.removeprefix("--")
        if known.startswith(_LIBTPU):
            yield Problem("xla.flags", flag, "is a flag of libtpu", "put it into xla.libtpu_args")
        elif known.startswith("xla_gpu_") and platform is not Platform.gpu:
            rule = f"is a flag for GPUs, hardware={name} is {platform.name}"
            yield Problem("xla.flags", flag, rule, "use xla=none, or a set for it")
    if config.xla.libtpu_args and platform is not Platform.tpu:
        rule = f"are flags for TPUs, hardware={name} is {platform.name}"
        got = f"[{config.xla.libtpu_args[0]}, …]"
        yield Problem("xla.libtpu_args", got, rule, "use xla=none, or a set for it")


def _processes(config: Config) -> Iterator[Problem]:
    """Who a process is comes whole or not at all; an address alone stands for the one found."""
    given = config.distributed
    address, count, number = given.coordinator_address, given.num_processes, given.process_id
    missing = {
        "distributed.coordinator_address": address,
        "distributed.num_processes": count,
        "distributed.process_id": number,
    }
    if (count, number) != (None, None):
        for path in [path for path, got in missing.items() if got is None]:
            fix = "or leave all three out where SLURM or a TPU knows them"
            yield Problem(path, "null", "missing, a process needs its number and theirs", fix)
    if address is not None and not _ADDRESS.fullmatch(address):
        rule = "must be HOST:PORT of process 0, as every host reaches it"
        yield Problem("distributed.coordinator_address", address, rule)
    if count is not None and number is not None and number >= count:
        rule = f"must be below distributed.num_processes={count}, they are numbered from 0"
        yield Problem("distributed.process_id", str(number), rule)


def _rehearsal(config: Config) -> Iterator[Problem]:
    if config.hardware.simulate and config.hardware.num_devices is None:
        rule = f"hardware={config.hardware.name} does not say how many devices to stand for"
        fix = "give hardware.num_devices, or a preset such as hardware=tpu_v4_32"
        yield Problem("hardware.simulate", "true", rule, fix)


def _spelling(path: str, flags: list[str]) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for flag in flags:
        match = FLAG.fullmatch(flag)
        if match is None:
            yield Problem(path, flag, "must be --NAME=VALUE, without spaces")
        elif match[1] in seen:
            yield Problem(path, flag, f"named twice, {seen[match[1]]} is there too", "give one")
        else:
            seen[match[1]] = flag
