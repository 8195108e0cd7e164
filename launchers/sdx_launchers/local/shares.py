"""This machine's cores and GPUs, dealt out to jobs that run at the same time."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"  # XLA and OpenBLAS count the cores they may use, OpenMP is told


@dataclass(frozen=True)
class Share:
    """What one job may use; none of a kind means that it is not told."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """Variables that keep a process to it, but for its cores."""
        told = {}
        if self.cores and _THREADS not in os.environ:
            told[_THREADS] = str(len(self.cores))
        if self.gpus:
            told[_VISIBLE] = ",".join(self.gpus)
        return told

    def describe(self) -> str:
        """As one would type it before a command."""
        pin = f"taskset -c {','.join(map(str, self.cores))} " if self.cores else ""
        return "".join(f"{name}={text} " for name, text in self.environment().items()) + pin


def this_machine() -> tuple[list[int], list[str]]:
    """The cores this process may use, those of one chip and the two threads of one core side by
    side, and its GPUs as CUDA names them; neither where they cannot be told."""
    cores = sorted(os.sched_getaffinity(0), key=_place) if hasattr(os, "sched_getaffinity") else []
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        return cores, [name.strip() for name in visible.split(",") if name.strip()]
    nodes = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return cores, [str(number) for number in range(len(nodes))]


def share_out(cores: Sequence[int], gpus: Sequence[str], count: int) -> list[Share]:
    """Equal shares for `count` jobs, disjoint where there is enough to go round.

    One job alone is left what it has.
    """
    if count == 1:
        return [Share((), ())]
    parts = zip(_parts(cores, count), _parts(gpus, count), strict=True)
    return [Share(tuple(some), tuple(others)) for some, others in parts]


def _parts(things: Sequence, count: int) -> list[Sequence]:
    size = len(things) // count
    if not size:
        return [things[n % len(things) :][:1] if things else [] for n in range(count)]
    return [things[n * size : (n + 1) * size] for n in range(count)]


def _place(core: int) -> tuple[int, int, int]:
    """(chip, core of it, thread), by Linux's Documentation/admin-guide/cputopology.rst."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        chip = int((folder / "physical_package_id").read_text())
        return chip, int((folder / "core_id").read_text()), core
    except (OSError, ValueError):
        return 0, core, core
