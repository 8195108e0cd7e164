"""What runs on a worker: it ends the job with the connection that asked for it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdx.record.launched import PIPE
from sdx_launchers.tpu import ssh

SUPERVISE = Path(ssh.__file__).with_name("supervise.py")
TOKEN = "sdx-ended-0123"
SAVES = (
    "import signal,sys,time,pathlib\n"
    "def save(*_): print('saving', flush=True); time.sleep(0.3); print('saved', flush=True);"
    " pathlib.Path('saved').touch(); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "print('ready', flush=True)\n"
    "while True: time.sleep(0.05)\n"
)
DEAF = (
    "import signal,subprocess,sys,time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('ready', child.pid, flush=True)\n"
    "while True: time.sleep(0.05)\n"
)


class Supervised:
    """The supervisor of `python -c SOURCE`, as ssh would run it; dead on leaving."""

    def __init__(self, folder: Path, source: str, **order: object):
        self.folder = folder / "jobs" / "$(touch x)"
        given = {
            "folder": str(self.folder),
            "files": {"config.yaml": "a: 1\n"},
            "argv": [sys.executable, "-c", source],
            "cwd": str(folder),
            "environment": {"SDX_TEST_TOKEN": "canary"},
            "pipe": PIPE,
            "lease_s": 600.0,
            "grace_s": 600.0,
            "token": TOKEN,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(SUPERVISE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            bufsize=0,
        )
        self.say(json.dumps(given | order))

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait()

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def end(self) -> tuple[int, str, int]:
        """Its exit code, what else the job said, and how the job ended."""
        assert self.process.stdout is not None and self.process.stderr is not None
        too_long = threading.Timer(300, self.process.kill)
        too_long.start()
        output, errors = self.process.stdout.read(), self.process.stderr.read()
        self.process.wait()
        too_long.cancel()
        [last] = [line for line in errors.decode().splitlines() if line.startswith(TOKEN)]
        return self.process.returncode, output.decode(), int(last.split()[1])


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(") ")[2][0] != "Z"


def test_exit_codes_and_signals_pass_through(tmp_path: Path) -> None:
    for source, code in {"import sys; sys.exit(255)": 255, "print(7)": 0}.items():
        with Supervised(tmp_path, source) as supervised:
            assert supervised.end()[::2] == (code, code)
    with Supervised(tmp_path, "import os; os.kill(os.getpid(), 9)") as killed:
        assert killed.end()[::2] == (137, -9)
    with Supervised(tmp_path, "", argv=["/no/such/program"]) as missing:
        code, output, reported = missing.end()
    assert (code, reported) == (126, 126) and "/no/such/program" in output


def test_the_job_has_its_files_and_variables_and_its_last_words_come(tmp_path: Path) -> None:
    source = "import os,sys; print(os.environ['SDX_TEST_TOKEN']); sys.stderr.write('x' * 300000)"
    with Supervised(tmp_path, source) as supervised:
        code, output, _ = supervised.end()
    assert code == 0 and output == "canary\n" + "x" * 300000
    assert (supervised.folder / "config.yaml").read_text() == "a: 1\n"
    assert supervised.folder.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "x").exists()


def test_asked_to_stop_it_saves(tmp_path: Path) -> None:
    with Supervised(tmp_path, SAVES) as supervised:
        assert supervised.line() == "ready"
        supervised.say("stop")
        assert supervised.end() == (75, "saving\nsaved\n", 75)


def test_what_works_for_the_job_lives_while_it_saves(tmp_path: Path) -> None:
    """Its loader's processes, for instance: the step that it saves after may need them."""
    source = SAVES.replace(
        "print('saving', flush=True); time.sleep(0.3);",
        "time.sleep(0.3); print('alone' if child.poll() else 'saving', flush=True);",
    ).replace(
        "print('ready'",
        "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'input()'],"
        " stdin=subprocess.PIPE)\nprint('ready'",
    )
    with Supervised(tmp_path, source) as supervised:
        assert supervised.line() == "ready"
        supervised.say("stop")
        assert supervised.end()[1].startswith("saving\nsaved\n")


def test_it_saves_and_ends_when_nobody_is_at_the_other_end(tmp_path: Path) -> None:
    """Nobody reads what it says while it saves, either."""
    with Supervised(tmp_path, SAVES) as supervised:
        assert supervised.line() == "ready"
        for stream in (supervised.process.stdout, supervised.process.stdin):
            assert stream is not None
            stream.close()
        assert supervised.process.wait(300) == 75
    assert (tmp_path / "saved").exists()


def test_it_ends_when_no_sign_of_life_comes(tmp_path: Path) -> None:
    with Supervised(tmp_path, SAVES, lease_s=4.0) as supervised:
        assert supervised.line() == "ready"
        for _ in range(45):
            time.sleep(0.1)
            supervised.say("")
        assert supervised.process.poll() is None, "signs of life were not heard"
        assert supervised.end()[::2] == (75, 75)


@pytest.mark.parametrize("how", ["kill", "end of input"])
def test_what_does_not_listen_is_killed_with_all_it_started(tmp_path: Path, how: str) -> None:
    with Supervised(tmp_path, DEAF, grace_s=0.5) as supervised:
        child = int(supervised.line().split()[1])
        if how == "kill":
            supervised.say("stop")
            supervised.say("kill")
        else:
            assert supervised.process.stdin is not None
            supervised.process.stdin.close()
        assert supervised.end()[::2] == (137, -9)
    assert not is_alive(child)


def test_a_supervisor_that_dies_leaves_the_job_the_end_of_a_pipe(tmp_path: Path) -> None:
    source = (
        f"import os; print('ready', flush=True); os.read(int(os.environ['{PIPE}']), 1);"
        "open('ended', 'w').close()"
    )
    with Supervised(tmp_path, source) as supervised:
        assert supervised.line() == "ready"
        os.kill(supervised.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 300
        while not (tmp_path / "ended").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
