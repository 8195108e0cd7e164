"""Lowers and compiles the two programs of a run for described devices, in this process.

What is compiled is what training runs: the same `program.build`, over a mesh of described devices.
"""

import math
import re
import resource
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from sdx.config import resolve
from sdx.config.schema import AttentionKind, Config, Platform
from sdx.config.sizes import image_sizes
from sdx.parallel.mesh import MeshError, claim_devices, make_mesh
from sdx.planning.collectives import collectives
from sdx.planning.compiled import CompiledProgram, CompiledReport, Overflow, ProgramBytes
from sdx.planning.topology import (
    CompilerMissing,
    TopologyError,
    check_described,
    described_devices,
    has_compiler,
)
from sdx.training.program import BatchError, build

REFUSALS = (BatchError, CompilerMissing, MeshError, TopologyError)
NAMES = ("encode", "step")
# XLA's scale of effort (openxla.org/xla/effort_levels). Given as an option of one compilation it
# does not outlast it, which JAX's setting jax_optimization_level does.
LEVELS: dict[str, Any] = {"default": 0, "O0": 9, "O1": 19, "O2": 29, "O3": 39}

_AMOUNT = r"([\d.]+)([KMGT])"
# libtpu's two ways to say it: what is needed, what there is. Units are of 1024.
_OVERFLOWS = (
    re.compile(rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)"),
    re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DISTRIBUTIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
_LOWERED_ONLY = (
    "lowered, not compiled: JAX's CUDA plugin is not installed here (pip install 'sdx[cuda]', also "
    "without a GPU); memory and collectives are not known"
)
_WITHOUT_CUDNN = (
    "attention: cuDNN is not installed here; plain attention stands for its kernel, so that "
    "temporaries are more than the run's"
)


@dataclass(frozen=True)
class _Programs:
    lowered: tuple[Lowered, Lowered]
    can_compile: bool
    notes: list[str]


def compile_here(config: Config, level: str) -> CompiledReport:
    """What `compiled.compile_program` answers; raises TopologyError for hardware that is not
    described well, and what the compiler raises."""
    start = time.perf_counter()
    programs = _lower(config)
    lower_s = time.perf_counter() - start
    answer = compile_lowered if programs.can_compile else _lowered_only
    return CompiledReport(
        programs={
            name: answer(lowered, level)
            for name, lowered in zip(NAMES, programs.lowered, strict=True)
        },
        level=level,
        versions=_versions(),
        lower_s=lower_s,
        host_peak_bytes=_peak_bytes(),
        is_compiled=programs.can_compile,
        notes=programs.notes,
    )


def _peak_bytes() -> int:
    """Most memory this process has held; Linux's ru_maxrss would begin at that of its parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        [peak] = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def overflow(message: str) -> Overflow | None:
    """What a compiler's error says of a device's memory; None where it is about something else."""
    for pattern in _OVERFLOWS:
        if found := pattern.search(message):
            needs, n, has, h = found.groups()
            return Overflow(int(float(needs) * _UNITS[n]), int(float(has) * _UNITS[h]))
    return None


def _lower(config: Config) -> _Programs:
    """Both programs over the described devices, with cuDNN's attention where cuDNN is installed."""
    check_described(config.hardware)
    can_compile = has_compiler(config.hardware.platform)
    mesh = _described_mesh(config) if can_compile else _virtual_mesh(config)
    notes = [] if can_compile else [_LOWERED_ONLY]
    platforms = None if can_compile else ("cuda",)
    try:
        return _Programs(_lower_over(config, mesh, platforms), can_compile, notes)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
    plain = replace(config.attention, kind=AttentionKind.dot_product)
    config = replace(config, attention=plain)
    return _Programs(_lower_over(config, mesh, platforms), can_compile, [*notes, _WITHOUT_CUDNN])


def _lower_over(
    config: Config, mesh: Mesh, platforms: tuple[str, ...] | None
) -> tuple[Lowered, Lowered]:
    # Where a decaying learning rate ends changes no size, so examples need not be known; which
    # buckets have any is not known, and the largest decides whether it fits.
    max_steps = resolve.max_steps(config, 1, mesh.size)
    largest = max(image_sizes(config), key=math.prod)
    return build(config, mesh, max_steps=max_steps, buckets={largest: 1.0}).lower(platforms)


def _described_mesh(config: Config) -> Mesh:
    return make_mesh(config.mesh, config.hardware, described_devices(config.hardware))


def _virtual_mesh(config: Config) -> Mesh:
    """Devices of this machine's CPU, for a program that is only lowered for others."""
    virtual = replace(config.hardware, platform=Platform.cpu, device_kind=None)
    claim_devices(virtual)
    return make_mesh(config.mesh, virtual, jax.devices("cpu")[: virtual.num_devices])


def compile_lowered(lowered: Lowered, level: str) -> CompiledProgram:
    """What the compiler says of one program; too large for a device is an answer too."""
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options={"optimization_level": LEVELS[level]})
    except jax.errors.JaxRuntimeError as error:
        too_large = overflow(str(error))
        if too_large is None:
            raise
        seconds = time.perf_counter() - start
        return CompiledProgram(None, too_large, flops=None, collectives={}, compile_s=seconds)
    return CompiledProgram(
        bytes=_bytes(compiled),
        overflow=None,
        flops=_flops(compiled),
        collectives=collectives(compiled.as_text() or ""),
        compile_s=time.perf_counter() - start,
    )


def _lowered_only(lowered: Lowered, level: str) -> CompiledProgram:
    return CompiledProgram(None, None, flops=None, collectives={}, compile_s=None)


def _bytes(compiled: Compiled) -> ProgramBytes:
    found: Any = compiled.memory_analysis()
    return ProgramBytes(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        peak=found.peak_memory_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def _flops(compiled: Compiled) -> float | None:
    """None where the platform does not count (CUDA, ahead of time)."""
    cost: Any = compiled.cost_analysis()
    return None if not cost else cost.get("flops")


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
