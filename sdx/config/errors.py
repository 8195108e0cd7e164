"""What is wrong with a configuration, as data, and the one screen that shows it.

A `Problem` has the four parts every sdx error has: where, got, what must hold, what to type
instead.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault.

    `path` is a key, group, flag or file; `got` its value as typed (None: there is none); `rule`
    says what is wrong or must hold; `fix` what to do. `suggested` is a key the person may have
    meant: a fault that follows from its absence is not shown.
    """

    path: str
    got: str | None
    rule: str
    fix: str | None = None
    suggested: str | None = None

    def __str__(self) -> str:
        where = self.path if self.got is None else f"{self.path}={self.got}"
        text = f"{where}: {self.rule}" + (f"; {self.fix}" if self.fix else "")
        return text if text.endswith(("?", ".")) else text + "."


class ConfigError(ValueError):
    """A configuration that must not run; `problems` holds everything wrong with it."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__(render(self.problems))


def render(problems: Sequence[Problem]) -> str:
    """All problems on one screen."""
    count = "1 fault" if len(problems) == 1 else f"{len(problems)} faults"
    lines = [f"sdx: {count} in the configuration; nothing was started."]
    lines += [f"  {problem}" for problem in problems]
    return "\n".join(lines)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` a person most likely meant by `name`, or None."""
    candidates = list(names)
    by_case = {candidate.lower(): candidate for candidate in reversed(candidates)}
    match = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.6)
    return by_case[match[0]] if match else None


def any_of(options: Iterable[object]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    words = [str(option) for option in options]
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + f" or {words[-1]}"
