"""Compiler flags in the environment of this process, before JAX is imported: it reads them once.

Nothing here imports JAX. What a person has set in the environment wins over the configuration,
where both name a flag.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from sdx.config.errors import ConfigError, Problem
from sdx.config.schema import HardwareConfig, Platform, XlaConfig
from sdx.parallel.flag_probe import JAXLIB, LIBTPU, Compiler, ProbeFailed, bad_flags, names_of

FRACTION = "XLA_CLIENT_MEM_FRACTION"
OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jaxlib reads either, and refuses both
VARIABLES = (JAXLIB.variable, LIBTPU.variable, FRACTION, OLD_FRACTION)
KEYS = {
    JAXLIB.variable: "xla.flags",
    LIBTPU.variable: "xla.libtpu_args",
    FRACTION: "xla.memory_fraction",
}
_CACHE = "~/.cache/sdx"

Say = Callable[[str], None]

_found: dict[str, str] = {}
"""The variables as the person left them."""
_in_force: dict[str, str] = {}
"""What JAX was started with, or will be."""


def set_flags(
    xla: XlaConfig, hardware: HardwareConfig, cache_dir: str | None, say: Say = print
) -> None:
    """Sets the variables that JAX, jaxlib and libtpu read. Call it before JAX is imported.

    `cache_dir` is the folder of compiled programs, where flags that were tried are remembered.
    `say` hears of what gives way to the environment, or is not set. Raises ConfigError for a flag
    that jaxlib or libtpu does not know, and where JAX has been imported with other flags.
    """
    if not _found:
        _found.update({name: os.environ.get(name, "") for name in VARIABLES})
        _in_force.update(_found)
    asked = _asked(xla, hardware, say)
    wanted = dict(_found)
    for compiler, flags in asked.items():
        wanted[compiler.variable] = _merged(compiler, flags, _found[compiler.variable], say)
    if (share := _fraction(xla, hardware, say)) is not None:
        wanted[FRACTION] = share
    _check_jax_is_to_come(wanted)
    _check_known(asked, wanted, Path(cache_dir or _CACHE).expanduser(), say)
    os.environ.update({name: text for name, text in wanted.items() if text})
    for name in [name for name, text in wanted.items() if not text]:
        os.environ.pop(name, None)
    _in_force.update(wanted)


def flags_in_force() -> dict[str, str]:
    """The variables of compiler flags that are set, whoever set them; for the record of a run."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def _asked(xla: XlaConfig, hardware: HardwareConfig, say: Say) -> Mapping[Compiler, list[str]]:
    """The flags of the configuration for what computes here: a rehearsal does on CPU devices."""
    flags = [flag for flag in xla.flags if not flag.startswith("--xla_gpu_")]
    if not hardware.simulate:
        return {JAXLIB: xla.flags, LIBTPU: xla.libtpu_args}
    if xla.libtpu_args or flags != xla.flags:
        say("xla: hardware.simulate=true computes on CPU devices, flags for others are left out")
    return {JAXLIB: flags, LIBTPU: []}


def _merged(compiler: Compiler, flags: list[str], theirs: str, say: Say) -> str:
    """The flags and the person's own, without those that theirs replace."""
    if theirs and not theirs.lstrip().startswith("-"):  # then XLA reads it as the name of a file
        path = Path(theirs.strip())
        theirs = path.read_text("utf-8") if flags and path.is_file() else theirs
    replaced = names_of(theirs)
    ours = []
    for flag in flags:
        [name] = names_of(flag)
        if name not in replaced:
            ours.append(flag)
        elif replaced[name] != flag:
            key = KEYS[compiler.variable]
            say(f"{key}: {flag} gives way to {replaced[name]} in {compiler.variable}")
    return " ".join([*ours, theirs] if theirs else ours)


def _fraction(xla: XlaConfig, hardware: HardwareConfig, say: Say) -> str | None:
    share = xla.memory_fraction
    if share is None or hardware.simulate or hardware.platform is not Platform.gpu:
        return None
    for name in (FRACTION, OLD_FRACTION):
        if theirs := _found[name]:
            if theirs != str(share):
                say(f"xla.memory_fraction: {share} gives way to {name}={theirs}")
            return None
    return str(share)


def _check_jax_is_to_come(wanted: Mapping[str, str]) -> None:
    if "jax" not in sys.modules:
        return
    rule = "JAX has started in this process with other flags, and reads them once"
    fix = "run this in a command of its own"
    if late := [name for name in KEYS if wanted[name] != _in_force[name]]:
        raise ConfigError([Problem(KEYS[name], wanted[name] or "none", rule, fix) for name in late])


def _check_known(
    asked: Mapping[Compiler, list[str]], wanted: Mapping[str, str], cache: Path, say: Say
) -> None:
    problems = []
    for compiler, flags in asked.items():
        if not flags or compiler.version is None:
            continue  # nothing of ours to try, or nobody who would read it
        try:
            found = bad_flags(compiler, wanted[compiler.variable], cache)
        except ProbeFailed as error:
            say(f"{KEYS[compiler.variable]}: could not be tried before the start ({error})")
            continue
        for bad in found:
            path = KEYS[compiler.variable] if bad.flag in flags else compiler.variable
            told_by = f"{compiler.package} {compiler.version}"
            if bad.is_known:
                problems.append(Problem(path, bad.flag, f"{told_by} cannot read this value"))
                continue
            near = f"did you mean {bad.meant}? Else " if bad.meant else ""
            fix = f"{near}leave it out, flags come and go with releases"
            problems.append(Problem(path, bad.flag, f"unknown to {told_by}", fix))
    if problems:
        raise ConfigError(problems)
