"""What the compiler says of a run on hardware that is not here: bytes, collectives, donation.

The programs are compiled in a process of their own (compiling.py): its peak memory is the
compiler's, flags and settings end with it, and a compiler that crashes or is killed is an error
here instead of the end of the plan. No JAX is imported.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdx.config.compose import to_yaml
from sdx.config.schema import Config
from sdx.planning.collectives import Collective

GIB = 2**30
# For JAX and libtpu where the chips are not: no other platform is looked for, no metadata server is
# asked (it would be waited for), several processes may load libtpu at once (else the second one
# fails on a lock file), and nothing is cached: only the chips could read it again.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
DONATED = 0.95  # weights, moments and average are a quarter each: none may be missing
SHOWN_LINES = 15  # of what a compiler that failed left on standard error


class CompilationRefused(ValueError):
    """The hardware is not described well enough, or its compiler is not installed."""


class CompilationFailed(RuntimeError):
    """The compiler crashed, was killed, or refused the program for another reason than memory."""


@dataclass(frozen=True)
class ProgramBytes:
    """XLA's own account of one program, on one device."""

    arguments: int
    outputs: int
    aliased: int
    """Of the outputs, what takes the place of arguments that were donated."""
    temporaries: int
    peak: int
    """Most that is alive at once, arguments included; without the gaps between."""
    code: int

    @property
    def total(self) -> int:
        """What the device must have while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Overflow:
    """The compiler found that the program does not fit one device."""

    needs: int
    has: int
    """What it lets programs have: hardware.hbm_gib of a preset."""


@dataclass(frozen=True)
class CompiledProgram:
    """One of the two programs of a run, `encode` or `step`."""

    bytes: ProgramBytes | None
    """None where it does not fit, or was only lowered."""
    overflow: Overflow | None
    flops: float | None
    """On one device in one call, as XLA counts: the body of a loop once (so one micro-step of
    several), a Pallas kernel not at all. None where it does not say."""
    collectives: dict[str, Collective]
    compile_s: float | None

    @property
    def donated(self) -> bool:
        """Whether outputs take the place of arguments, metrics and padding aside."""
        return self.bytes is not None and self.bytes.aliased > DONATED * self.bytes.outputs


@dataclass(frozen=True)
class CompiledReport:
    """Both programs, compiled for the described hardware."""

    programs: dict[str, CompiledProgram]
    level: str
    """Optimisation level; memory at O0 is an upper bound."""
    versions: dict[str, str]
    lower_s: float
    host_peak_bytes: int
    """Of the compiling process."""
    is_compiled: bool
    """False where the platform's compiler is not installed: then both were lowered, which proves
    that they can be traced, split and translated, and says nothing of memory."""
    notes: list[str]
    """What was compiled otherwise than it would run, and why."""

    @property
    def compile_s(self) -> float:
        """Seconds for both."""
        return sum(program.compile_s or 0.0 for program in self.programs.values())

    @property
    def needed_bytes(self) -> int | None:
        """Most that one device must have at a time; None where nothing was compiled.

        While one program runs, what the other one is given lies beside it: the state beside
        `encode`, the frozen weights beside `step`.
        """
        found = self.programs
        if not self.is_compiled:
            return None
        return max(_needs(found["encode"], found["step"]), _needs(found["step"], found["encode"]))

    @property
    def available_bytes(self) -> int | None:
        """What the compiler lets programs have, where it came to say it."""
        overflows = [program.overflow for program in self.programs.values()]
        return next((overflow.has for overflow in overflows if overflow), None)

    def fits(self, hbm_bytes: int) -> bool | None:
        """Whether devices of that memory are enough; None where nothing was compiled."""
        if self.needed_bytes is None:
            return None
        return self.available_bytes is None and self.needed_bytes <= hbm_bytes


def compile_program(config: Config, level: str = "O0") -> CompiledReport:
    """`config`'s programs `encode` and `step`, compiled for `config.hardware`.

    `level` is XLA's effort, `O0` to `O3` or `default`. Takes minutes for a whole model. Raises
    CompilationRefused before anything is compiled, CompilationFailed where there is no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved, result, said = (Path(folder) / name for name in ("config.yaml", "result", "stderr"))
        saved.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", "sdx.planning.compiling", str(saved), str(result), level]
        start = time.monotonic()
        code, peak_bytes = _run(command, said)
        if code == 0:
            return from_json(result.read_text(encoding="utf-8"))
        text = said.read_text(encoding="utf-8", errors="replace")
        if result.is_file():  # a refusal, in words
            raise CompilationRefused(result.read_text(encoding="utf-8"))
        raise CompilationFailed(_failure(config, code, time.monotonic() - start, peak_bytes, text))


def to_json(report: CompiledReport) -> str:
    """What `from_json` reads."""
    return json.dumps(asdict(report))


def from_json(text: str) -> CompiledReport:
    """The report that `to_json` wrote."""
    found: dict[str, Any] = json.loads(text)
    programs = {name: _program(program) for name, program in found.pop("programs").items()}
    return CompiledReport(programs=programs, **found)


def _program(found: dict[str, Any]) -> CompiledProgram:
    held, overflow = found.pop("bytes"), found.pop("overflow")
    collectives = found.pop("collectives")
    return CompiledProgram(
        bytes=None if held is None else ProgramBytes(**held),
        overflow=None if overflow is None else Overflow(**overflow),
        collectives={kind: Collective(**one) for kind, one in collectives.items()},
        **found,
    )


def _needs(running: CompiledProgram, other: CompiledProgram) -> int:
    resident = other.bytes.arguments if other.bytes else 0
    if running.overflow:
        return running.overflow.needs + resident
    assert running.bytes is not None, "neither compiled nor too large"
    return running.bytes.total + resident


def _run(command: Sequence[str], said: Path) -> tuple[int, int]:
    """Exit code (negative: the signal) and peak memory of a process, its noise in a file."""
    with said.open("wb") as noise:
        child = subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=noise,
            stderr=subprocess.STDOUT,
        )
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * 1024


def _failure(config: Config, code: int, seconds: float, peak_bytes: int, text: str) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    what = (
        f"compile=true: the compiler for hardware={config.hardware.name} {how} after "
        f"{seconds:.0f} s, with {peak_bytes / GIB:.1f} GiB of this machine's memory."
    )
    if code == -9:
        return f"{what} Linux does that when memory runs out; a machine with more can tell."
    lines = [line for line in text.splitlines() if line.strip()][-SHOWN_LINES:]
    return "\n".join([f"{what} Its last words:", *(f"  {line}" for line in lines)])
