"""Whether a compiler knows a set of flags, found out in a process of its own.

jaxlib and libtpu end the process that hands them a flag they do not know, without a word to Python;
and flags come and go with their releases. What was found good is remembered, so that the next start
tries nothing.
"""

import difflib
import hashlib
import importlib.util
import mmap
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

TIMEOUT_S = 120
_NUM_GUESSES = 3


class ProbeFailed(RuntimeError):
    """The flags could not be tried; nothing is known of them."""


@dataclass(frozen=True)
class BadFlag:
    """A flag that would end the process: unknown, or with a value that cannot be read."""

    flag: str
    is_known: bool
    meant: str | None = None
    """A flag that is known, with a name like it."""


@dataclass(frozen=True)
class Compiler:
    """Who reads an environment variable of flags: what makes it do so, and what it says."""

    variable: str
    package: str
    library: str
    code: str
    unknown: str
    unreadable: str

    @property
    def version(self) -> str | None:
        """Of the installed package; None without it."""
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(self.package)

    @property
    def path(self) -> Path | None:
        """The shared library."""
        spec = importlib.util.find_spec(self.package)
        for folder in () if spec is None else spec.submodule_search_locations or ():
            if (file := Path(folder) / self.library).is_file():
                return file


JAXLIB = Compiler(
    "XLA_FLAGS",
    "jaxlib",
    "libjax_common.so",
    "from jaxlib import xla_client; xla_client.CompileOptions()",
    r"Unknown flags? in XLA_FLAGS: (?P<flags>.*)",
    r"Couldn't interpret value .* for flag (?P<name>\w+)",
)
LIBTPU = Compiler(
    "LIBTPU_INIT_ARGS",
    "libtpu",
    "libtpu.so",
    "from jaxlib import xla_client; import libtpu;"
    "xla_client.load_pjrt_plugin_dynamically('tpu', libtpu.get_library_path());"
    "xla_client.initialize_pjrt_plugin('tpu')",
    r"Unknown command line flag '(?P<name>\w+)'",
    r"Illegal value .* specified for flag '(?P<name>\w+)'",
)
# The probe reads no metadata of a TPU and takes no lock from a process that computes on it.
_SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}


def bad_flags(compiler: Compiler, text: str, folder: Path) -> list[BadFlag]:
    """The flags of `text` that would end a process; an empty list where all are good.

    `text` is what the environment variable would hold. `folder` is where good ones are
    remembered, by the compiler's version. Raises ProbeFailed.
    """
    seen = folder / f"known_flags-{_digest(compiler, text)}"
    if seen.is_file():
        return []
    if not (found := list(_tried(compiler, text))):
        with suppress(OSError):  # a folder that cannot be written: tried again next time
            folder.mkdir(parents=True, exist_ok=True)
            seen.write_text(f"{compiler.package} {compiler.version}: {text}\n", "utf-8")
    return found


def names_of(text: str) -> dict[str, str]:
    """The flags of an environment variable's text, by name."""
    matches = [re.match(r"--?(\w+)", word) for word in _words(text)]
    return {match[1]: match.string for match in matches if match}


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark that is not closed
        return text.split()


def _digest(compiler: Compiler, text: str) -> str:
    told = f"{compiler.package} {compiler.version} {text}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _tried(compiler: Compiler, text: str) -> Iterator[BadFlag]:
    said = _said(compiler, text)
    if said is None:
        return
    flags = names_of(text)
    unknown, unreadable = _named(compiler.unknown, said), _named(compiler.unreadable, said)
    for name in unknown:
        flag = flags.get(name, f"--{name}")
        yield BadFlag(flag, is_known=False, meant=_meant(compiler, flag))
    for name in unreadable:
        yield BadFlag(flags.get(name, f"--{name}"), is_known=True)
    if not unknown and not unreadable:
        last = said.strip().splitlines()[-1:] or ["no word"]
        raise ProbeFailed(f"{compiler.package} ended with: {last[0]}")


def _said(compiler: Compiler, text: str) -> str | None:
    """What a process with these flags says before it dies; None where it lives."""
    environment = {**os.environ, **_SETTINGS, compiler.variable: text}
    try:
        done = subprocess.run(
            [sys.executable, "-c", compiler.code],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProbeFailed(str(error)) from error
    return done.stderr if done.returncode else None


def _named(pattern: str, said: str) -> list[str]:
    """Names of flags that a compiler complains of in these words."""
    found: dict[str, None] = {}
    for match in re.finditer(pattern, said):
        groups = match.groupdict()
        names = names_of(groups["flags"]) if "flags" in groups else [groups["name"]]
        found.update(dict.fromkeys(names))
    return list(found)


def _meant(compiler: Compiler, flag: str) -> str | None:
    """A flag with a name like it and the same value that the compiler knows."""
    name, _, value = flag.lstrip("-").partition("=")
    for guess in difflib.get_close_matches(name, _spelled_in(compiler), _NUM_GUESSES, cutoff=0.75):
        said = _said(compiler, f"--{guess}={value}")
        if said is None or guess in _named(compiler.unreadable, said):
            return f"--{guess}"
    return None


@cache
def _spelled_in(compiler: Compiler) -> list[str]:
    """What is spelled like a flag anywhere in the library, since no compiler lists its flags."""
    if compiler.path is None:
        return []
    with (
        compiler.path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        words = set(re.findall(rb"xla_[a-z0-9_]{4,}(?=\0)", content))
    return sorted(word.decode() for word in words)
