"""Commands on the workers of a TPU, over OpenSSH or over a command that a person names instead.

Everything goes through standard input and output of one command a worker, files too, so that
`gcloud compute tpus tpu-vm ssh` serves as well as ssh: no scp, no rsync.

A worker is a machine nobody has met: what key its sshd shows the first time is noted in a file of
that TPU's own and must be shown from then on (StrictHostKeyChecking=accept-new). The file of the
user is neither read nor written: addresses of deleted TPUs are given to other machines.
"""

import os
import re
import shutil
import string
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdx.config.errors import Problem
from sdx.config.launching import TpuSettings
from sdx.record.redact import redact

CONNECTION_FAILED = 255
"""What ssh ends with where there is, or was, no connection."""
_FIELDS = ("node", "zone", "project", "worker", "host", "command")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REMOTE_DIR = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+@%-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*\$?")  # with OS Login a service account's number
_TAIL_BYTES = 1 << 16
_ALIVE_EVERY_S, _ALIVE_COUNT = 15, 8  # two minutes without an answer are a lost connection


@dataclass(frozen=True)
class Host:
    """One worker: of which node, the how manieth of the job, and where its sshd answers."""

    node: str
    worker: int
    """Its number in the node, as Google counts."""
    address: str

    def __str__(self) -> str:
        return f"worker {self.worker} of {self.node} ({self.address})"


def ssh_argv(settings: TpuSettings, host: Host, command: str, known_hosts: Path) -> list[str]:
    """What to run here so that the shell of `host` runs `command`."""
    if settings.ssh_command:
        fields = {
            "node": host.node,
            "zone": settings.zone or "",
            "project": settings.project or "",
            "worker": str(host.worker),
            "host": host.address,
            "command": command,
        }
        return [text.format_map(fields) for text in settings.ssh_command]
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "10",
        "ServerAliveInterval": str(_ALIVE_EVERY_S),
        "ServerAliveCountMax": str(_ALIVE_COUNT),
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": f'"{known_hosts}"',
        "GlobalKnownHostsFile": "none",
        "HostKeyAlias": f"{host.node}-{host.worker}",
        "ControlPath": "none",  # a connection that is shared with others outlives ours
        "ForwardAgent": "no",
        "LogLevel": "ERROR",
    }
    argv = ["ssh", "-T", "-x", "-p", str(settings.ssh_port)]
    for name, value in options.items():
        argv += ["-o", f"{name}={value}"]
    if settings.ssh_user:
        argv += ["-l", settings.ssh_user]
    if settings.ssh_key:
        argv += ["-i", os.path.expanduser(settings.ssh_key), "-o", "IdentitiesOnly=yes"]
    return [*argv, "--", host.address, command]


def ssh_problems(settings: TpuSettings) -> Iterator[Problem]:
    """Everything about the way to the workers that is wrong and can be seen from here."""
    if settings.ssh_command:
        yield from _template_problems(settings.ssh_command)
    elif shutil.which("ssh") is None:
        fix = "install OpenSSH's client, or give a command that stands for it"
        yield Problem("hydra.launcher.ssh_command", "[]", "there is no `ssh` on this machine", fix)
    if settings.ssh_key and not Path(settings.ssh_key).expanduser().is_file():
        yield Problem("hydra.launcher.ssh_key", settings.ssh_key, "there is no such file")
    if settings.ssh_user is not None and not _USER.fullmatch(settings.ssh_user):
        yield Problem("hydra.launcher.ssh_user", settings.ssh_user, "must be the name of a user")
    if not _REMOTE_DIR.fullmatch(settings.remote_dir):
        rule = "must be a plain path: letters, digits and _./+@%-, no ~"
        fix = "a relative one lies in the home folder"
        yield Problem("hydra.launcher.remote_dir", settings.remote_dir, rule, fix)
    for name in settings.environment:
        if not _VARIABLE.fullmatch(name):
            fix = "names alone; values are taken from here"
            yield Problem("hydra.launcher.environment", name, "must be a variable's name", fix)
        elif name not in os.environ:
            fix = f"export {name}, or leave it out"
            yield Problem("hydra.launcher.environment", name, "is not set here", fix)


def _template_problems(template: Sequence[str]) -> Iterator[Problem]:
    path, allowed = "hydra.launcher.ssh_command", ", ".join(f"{{{name}}}" for name in _FIELDS)
    found: set[str] = set()
    for text in template:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        except ValueError as error:
            yield Problem(path, text, f"cannot be read ({error})", "write {{ for a brace")
            continue
        for name in sorted(names - {*_FIELDS}):
            yield Problem(path, f"{{{name}}}", f"must be one of {allowed}")
        found |= names
    if "command" not in found:
        fix = "[gcloud,compute,tpus,tpu-vm,ssh,'{node}','--worker={worker}','--command={command}']"
        yield Problem(path, " ".join(template), "must have {command}, what the worker runs", fix)
    elif shutil.which(template[0]) is None:
        yield Problem(path, template[0], "there is no such command on this machine")


def start(argv: Sequence[str], stdout: int, stderr: int) -> "subprocess.Popen[bytes]":
    """The running client, with a pipe to its standard input; Ctrl-C here does not reach it."""
    return subprocess.Popen(
        list(argv),
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def last_lines(path: Path, count: int) -> str:
    """The last lines of a log that are not empty; their passwords and tokens blotted out."""
    with open(path, "rb") as log:
        log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = log.read().decode(errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return redact("\n".join(lines[-count:]))
