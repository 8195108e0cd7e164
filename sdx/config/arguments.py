"""The command line of `train`, `plan` and `encode`: which tokens are overrides, which are switches.

A person's habits from other trainers (`--train_batch_size 4`) are recognised here, before Hydra's
parser would turn them into a usage message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdx.config import peers
from sdx.config.command_keys import COMMAND_KEYS, keys_of
from sdx.config.errors import Problem, nearest
from sdx.config.leaves import leaves

# Hydra's own switches that are handed to it, with whether they take a value.
_HYDRA = {
    "--cfg": True,
    "-c": True,
    "--info": True,
    "-i": True,
    "--package": True,
    "-p": True,
    "--shell-completion": True,
    "-sc": True,
    "--resolve": False,
    "--hydra-help": False,
    "--version": False,
}
_OURS = {
    "--help": "help",
    "-h": "help",
    "--multirun": "multirun",
    "-m": "multirun",
    "--run": "run",
    "-r": "run",
    "--from": "from",
    "--config-dir": "config_dir",
    "-cd": "config_dir",
}
_REFUSED = {
    "--config-path": "--config-dir FOLDER adds options to the groups",
    "-cp": "--config-dir FOLDER adds options to the groups",
    "--config-name": "--from RUN starts from a saved configuration",
    "-cn": "--from RUN starts from a saved configuration",
    "--experimental-rerun": "--from RUN starts from a saved configuration",
}


@dataclass
class Arguments:
    """What a command line asks for."""

    overrides: list[str] = field(default_factory=list)
    hydra_switches: list[str] = field(default_factory=list)
    wants_help: bool = False
    multirun: bool = False
    saved: Path | None = None
    config_dir: Path | None = None
    problems: list[Problem] = field(default_factory=list)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Sort `argv` into overrides and switches; flags sdx does not have become problems."""
    result = Arguments()
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, has_value, value = token.partition("=")
        if not token.startswith("-") or token == "-":
            result.overrides.append(token)
        elif name in _HYDRA:
            result.hydra_switches.append(token)
            if _HYDRA[name] and not has_value and tokens:
                result.hydra_switches.append(tokens.pop(0))
        elif name in _OURS:
            _ours(result, _OURS[name], value if has_value else None, tokens)
        elif name in _REFUSED:
            result.problems.append(Problem(name, None, "not a switch of sdx", _REFUSED[name]))
        else:
            result.problems.append(_foreign(name, value if has_value else None, tokens))
    return result


def _ours(result: Arguments, switch: str, value: str | None, tokens: list[str]) -> None:
    if switch in {"from", "config_dir"}:
        value = value if value is not None else tokens.pop(0) if tokens else ""
        flag = "--from" if switch == "from" else "--config-dir"
        folder = Path(value).expanduser()
        if "://" in value:
            fix = "copy it here; a run in a store goes on by the command that began it"
            result.problems.append(Problem(flag, value, "must be a local file or folder", fix))
        elif not value or not folder.exists():
            result.problems.append(Problem(flag, value, "no such file or folder"))
        elif switch == "from":
            result.saved = folder
        else:
            result.config_dir = folder
    result.wants_help |= switch == "help"
    result.multirun |= switch == "multirun"


def _foreign(name: str, value: str | None, tokens: list[str]) -> Problem:
    """The answer to a flag of another trainer; takes its value from `tokens`."""
    if value is None and tokens and not tokens[0].startswith("--") and "=" not in tokens[0]:
        value = tokens.pop(0)
        while tokens and not tokens[0].startswith("-") and "=" not in tokens[0]:
            tokens.pop(0)  # nargs="+"
    shown = name if value is None else f"{name} {value}"
    if known := peers.answer(name, value):
        return Problem(shown, None, *known)
    key = name.lstrip("-").replace("-", "_")
    by_name = {path.rpartition(".")[2]: path for path in reversed(leaves())}
    own = [name for command in COMMAND_KEYS for name in keys_of(command)]
    near = nearest(key, [*own, *leaves(), *by_name])
    near = by_name.get(near, near) if near else None
    fix = "options are written KEY=VALUE" + (f": {near}={value or '…'}" if near else "")
    return Problem(shown, None, "unknown flag", fix)
