"""What is run here to reach a worker, and what is wrong about the way there."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdx.config.launching import TpuSettings
from sdx_launchers.tpu.ssh import Host, last_lines, ssh_argv, ssh_problems

HOST = Host("sdx-a1", 2, "10.0.0.3")
COMMAND = "cd '/home/me/my jobs' && echo $(hostname); exit 7"
GCLOUD = [
    "gcloud", "compute", "tpus", "tpu-vm", "ssh", "{node}", "--zone={zone}",
    "--worker={worker}", "--tunnel-through-iap", "--command={command}",
]  # fmt: skip


@pytest.mark.fast
def test_the_command_is_one_word_and_nothing_is_asked_of_a_person(tmp_path: Path) -> None:
    known = tmp_path / "known hosts"
    argv = ssh_argv(TpuSettings(ssh_user="me", ssh_port=2222), HOST, COMMAND, known)
    assert argv[-3:] == ["--", "10.0.0.3", COMMAND]
    assert argv[argv.index("-p") + 1] == "2222" and argv[argv.index("-l") + 1] == "me"
    options = dict(word.split("=", 1) for word in argv if "=" in word and word != COMMAND)
    assert options["BatchMode"] == "yes" and options["HostKeyAlias"] == "sdx-a1-2"
    assert options["StrictHostKeyChecking"] == "accept-new"
    shown = subprocess.run(["ssh", "-G", *argv[1:-1]], capture_output=True, text=True, check=True)
    assert f"userknownhostsfile {known}" in shown.stdout.replace('"', "")


@pytest.mark.fast
def test_a_template_gets_its_fields_and_keeps_the_command_whole(tmp_path: Path) -> None:
    settings = TpuSettings(zone="us-central2-b", ssh_command=GCLOUD, ssh_user="ignored")
    argv = ssh_argv(settings, HOST, COMMAND, tmp_path)
    assert argv[5:8] == ["sdx-a1", "--zone=us-central2-b", "--worker=2"]
    assert argv[-1] == f"--command={COMMAND}"


FAULTS = {
    "no command": (dict(ssh_command=[sys.executable, "{node}"]), "must have {command}"),
    "other field": (dict(ssh_command=[sys.executable, "{name}", "{command}"]), "{name}: must be"),
    "open brace": (dict(ssh_command=[sys.executable, "{command", "{command}"]), "cannot be read"),
    "no such program": (dict(ssh_command=["no-such-ssh", "{command}"]), "no such command"),
    "no key": (dict(ssh_key="missing"), "there is no such file"),
    "user that is an option": (dict(ssh_user="-oProxyCommand=touch x"), "name of a user"),
    "folder that is a command": (dict(remote_dir="$(touch x)"), "plain path"),
    "folder with a newline": (dict(remote_dir="sdx\ntouch x"), "plain path"),
    "folder that is an option": (dict(remote_dir="-rf"), "plain path"),
    "value in the name": (dict(environment=["A=secret"]), "must be a variable's name"),
    "variable that is not set": (dict(environment=["SDX_TEST_NOT_SET"]), "is not set here"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_before_anything_is_touched(name: str) -> None:
    settings, text = FAULTS[name]
    problems = list(ssh_problems(TpuSettings(**settings)))
    assert len(problems) == 1 and text in str(problems[0]), problems


@pytest.mark.fast
def test_defaults_are_without_fault() -> None:
    assert list(ssh_problems(TpuSettings())) == []


@pytest.mark.fast
def test_last_lines_are_shown_without_tokens(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"one\ntwo hf_{'a' * 30}\n\nthree\n\n")
    assert last_lines(log, 2) == "two REDACTED\nthree"
