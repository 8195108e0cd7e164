"""The batch script: what it says to the letter, and what it does with the ends of its processes.

`python -m tests.launchers.test_slurm_script` writes the files of golden/ again; read the diff
before committing it.
"""

import json
import os
import pickle
import pickletools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import sdx
from sdx.record.paths import RunPaths
from sdx.record.status import Status
from sdx.record.stop_request import request_stop
from sdx_launchers.jobs import LaunchError
from sdx_launchers.launch_record import write_job, write_launch
from sdx_launchers.slurm.script import Submission, render, submit
from tests.launchers.slurm_jobs import (
    make_job,
    make_settings,
    make_submission,
    put_on_path,
    slurm_config,
)

GOLDEN = Path(__file__).parent / "golden"
SDX = Path(sdx.__path__[0]).parent
SECRET = "canary-5f0c1b"


def single() -> str:
    return render(make_submission([make_job()], settings := make_settings()), settings)


def two_nodes_of_eight() -> str:
    settings = make_settings(partition="gpu", account="ann@lab", cpus_per_task=12, mem_gib=200.0)
    config = slurm_config("gpu_h100_8", num_devices=16, num_hosts=2)
    return render(make_submission([make_job(config=config)], settings), settings)


def throttled_array() -> str:
    settings = make_settings(
        qos="long", constraint="a100|h100", exclusive=True, timeout_min=90, signal_delay_s=60,
        max_requeues=3, retries=0,
        additional_parameters={"reservation": "week 47", "mail_type": "END"},
    )  # fmt: skip
    config = slurm_config("gpu_a100_8")
    jobs = [make_job(name, config=config) for name in ("a", "b", "c")]
    return render(make_submission(jobs, settings, max_parallel=2), settings)


def container() -> str:
    settings = make_settings(
        python="/usr/bin/python3",
        command_prefix=["apptainer", "exec", "--nv", "/images/sdx 2.sif"],
        setup=["module load cuda/12.4", 'export NCCL_DEBUG="WARN"'],
        srun_args=["--mpi=none", "--kill-on-bad-exit=0"],
    )
    return render(make_submission([make_job()], settings), settings)


SCRIPTS = {
    "single": single,
    "two_nodes_of_eight": two_nodes_of_eight,
    "throttled_array": throttled_array,
    "container": container,
}


def shown(name: str) -> str:
    """With a Python of any machine."""
    return SCRIPTS[name]().replace(sys.executable, "/home/ann/venv/bin/python") + "\n"


@pytest.mark.fast
@pytest.mark.parametrize("name", SCRIPTS)
def test_golden(name: str) -> None:
    golden = (GOLDEN / f"{name}.sh").read_text()
    assert shown(name) == golden, "python -m tests.launchers.test_slurm_script"


@pytest.mark.fast
def test_values_that_reach_a_script_are_quoted(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    root = tmp_path / f"a folder $(touch {touched}) 'and' `touch {touched}`".replace("/", ":")
    settings = make_settings(
        srun_args=[f"--comment=$(touch {touched})"],
        additional_parameters={"comment": f"`touch {touched}`; touch {touched}"},
        python=f"/opt/$(touch {touched})/python",
    )
    submission = make_submission([make_job(root=root)], settings, root=root)
    path = put_on_path(tmp_path / "bin", srun="exit 0", env="exit 0", rm="exit 0")
    script = tmp_path / "script.sh"
    script.write_text(render(submission, settings))
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", str(script)], env=environment, capture_output=True, cwd=tmp_path)
    assert not touched.exists()


@dataclass
class Scheduler:
    """A script with commands of SLURM that write down how they are called."""

    folder: Path
    settings: dict[str, Any]
    state: str = "RUNNING"
    says: str = ""
    """What srun says, besides its exit code."""
    does: str = ""
    """A shell line that srun runs."""

    def __post_init__(self) -> None:
        self.job = make_job(root=self.folder)
        write_job(self.job, "sdx_slurm")
        self.log = self.folder / "log.out"
        write_launch(self.job, "sdx_slurm", "7", logs=[str(self.log)])

    def run(self, code: int, **variables: str) -> int:
        """Runs the script with a srun that ends so; its exit code."""
        settings = make_settings(python=sys.executable, **self.settings)
        submission = make_submission([self.job], settings, root=self.folder)
        submission = replace(submission, python_path=(SDX, SDX / "launchers"))
        script = self.folder / "script.sh"
        script.write_text(render(submission, settings))
        calls = shlex.quote(str(self.folder / "calls"))
        # A requeue ends the script, as SLURM does.
        scontrol = (
            f'echo "$*" >> {calls}\n'
            f'[ "$1" != show ] || echo "JobId=7 JobState={self.state} Reason=None"\n'
            '[ "$1" != requeue ] || { kill -KILL -$(ps -o pgid= $$ | tr -d " "); }'
        )
        said = f"printf %s {shlex.quote(self.says)} >&2"
        srun = f'echo "srun $*" >> {calls}\n{said}\n{self.does}\nexit {code}'
        path = put_on_path(self.folder / "bin", scontrol=scontrol, srun=srun)
        environment = os.environ | {
            "PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
        } | variables  # fmt: skip
        with self.log.open("ab") as log:
            ended = subprocess.run(
                ["bash", str(script)], env=environment, stdout=log, stderr=log, timeout=600,
                start_new_session=True,
            )  # fmt: skip
        return ended.returncode

    def calls(self, word: str) -> list[str]:
        path = self.folder / "calls"
        return (
            [c for c in path.read_text().splitlines() if c.startswith(word)]
            if path.exists()
            else []
        )

    @property
    def requeued(self) -> int:
        return len(self.calls("requeue"))

    @property
    def ended(self) -> dict[str, Any] | None:
        path = self.job.folder / "ended.json"
        return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("code", "says", "ends_with"),
    [
        (0, "", 0),
        (1, "srun: error: n1: task 1: Exited with exit code 1\n", 1),
        (2, "srun: error: n2: tasks 2-3: Exited with exit code 2\n", 2),
        # srun ended the others, whose codes are higher
        (
            143,
            "srun: error: n2: task 1: Exited with exit code 1\nsrun: error: n1: task 0: Terminated",
            1,
        ),
        (127, "", 127),
    ],
)
def test_what_is_done_or_failed_does_not_go_on(
    tmp_path: Path, code: int, says: str, ends_with: int
) -> None:
    scheduler = Scheduler(tmp_path, {}, says=says)
    assert scheduler.run(code) == ends_with
    assert scheduler.requeued == 0
    assert scheduler.ended is not None and scheduler.ended["code"] == ends_with
    assert scheduler.ended["id"] == "7"


@pytest.mark.parametrize(
    ("code", "says", "kind"),
    [
        (75, "", "requeues"),
        (140, "", "requeues"),  # SIGUSR2 before sdx could listen
        (143, "srun: error: n1: task 0: Terminated\n", "requeues"),
        (137, "srun: error: n1: task 1: Killed\n", "retries"),
        (143, "srun: error: n1: task 1: Killed\nsrun: error: n2: task 3: Terminated\n", "retries"),
        (75, "srun: error: n1: task 1: Out Of Memory\n", "retries"),
        (139, "srun: error: n1: task 0: Segmentation fault (core dumped)\n", "retries"),
        (121, "srun: error: Unable to create step for job 7: Invalid\n", "retries"),
    ],
)
def test_a_stopped_or_crashed_job_goes_back_into_the_queue_until_its_limit(
    tmp_path: Path, code: int, says: str, kind: str
) -> None:
    limits = {"max_requeues": 2, "retries": 0} if kind == "requeues" else {"retries": 2}
    scheduler = Scheduler(tmp_path, limits, says=says)
    for restart in (0, 1):
        scheduler.run(code, SLURM_RESTART_COUNT=str(restart))
        assert scheduler.requeued == restart + 1 and scheduler.ended is None
    assert scheduler.calls("requeue") == ["requeue 7"] * 2
    assert scheduler.run(code, SLURM_RESTART_COUNT="2") > 0
    assert scheduler.requeued == 2
    key = "max_requeues" if kind == "requeues" else "retries"
    assert scheduler.ended is not None and f"hydra.launcher.{key}" in scheduler.ended["reason"]
    assert f"requeued, 2 of at most 2 {kind}" in scheduler.log.read_text()


def test_an_element_of_an_array_goes_back_alone(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path, {})
    scheduler.run(75, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="9")
    assert scheduler.calls("requeue") == ["requeue 7_0"]


def test_a_process_of_an_earlier_start_is_not_blamed(tmp_path: Path) -> None:
    """All starts of a job write to one log."""
    scheduler = Scheduler(tmp_path, {}, says="srun: error: n1: task 1: Killed\n")
    scheduler.run(137)
    scheduler.says = ""
    assert scheduler.run(1, SLURM_RESTART_COUNT="1") == 1
    assert scheduler.requeued == 1


@pytest.mark.parametrize("how", ["stopped", "pruned", "cancelled by SLURM"])
def test_a_job_that_was_asked_to_end_is_not_requeued(tmp_path: Path, how: str) -> None:
    scheduler = Scheduler(tmp_path, {})
    if how == "stopped":
        scheduler.does = f"touch {scheduler.job.folder}/stopped"
    elif how == "pruned":
        (tmp_path / scheduler.job.name).mkdir()
        request_stop(RunPaths(tmp_path / scheduler.job.name), Status.pruned, "worse than others")
    else:
        scheduler.state = "COMPLETING"
    assert scheduler.run(75) == 75
    assert scheduler.requeued == 0
    if how == "pruned":
        assert scheduler.ended is not None and scheduler.ended["reason"] == "worse than others"


def test_a_stopped_job_that_waits_does_not_start(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path, {})
    (scheduler.job.folder / "stopped").touch()
    scheduler.run(0)
    assert scheduler.calls("srun") == []


def test_a_job_whose_nodes_are_lost_again_and_again_ends(tmp_path: Path) -> None:
    """SLURM requeues it then, and no script of its is asked."""
    scheduler = Scheduler(tmp_path, {"max_requeues": 1, "retries": 2})
    assert scheduler.run(0, SLURM_RESTART_COUNT="4") == 1
    assert scheduler.calls("srun") == []
    assert scheduler.run(0, SLURM_RESTART_COUNT="3") == 0


def test_set_up_lines_that_end_at_errors_do_not_end_the_script(tmp_path: Path) -> None:
    scheduler = Scheduler(tmp_path, {"setup": ["set -euo pipefail"]})
    scheduler.run(75)
    assert scheduler.requeued == 1


def submission_in(folder: Path, **more: Any) -> tuple[Submission, Any]:
    settings = make_settings(**more)
    jobs = [make_job(name, root=folder) for name in ("a", "b")]
    return make_submission(jobs, settings, root=folder), settings


def test_what_is_handed_in_names_nothing_of_sdx_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = 'env > "$0.env"; echo "Submitted batch job 12"'
    monkeypatch.setenv("PATH", put_on_path(tmp_path / "bin", sbatch=sbatch, srun="exit 1"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SLURM_JOB_ID", "3")  # typed within a job
    monkeypatch.setenv("SLURM_NTASKS", "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submission, settings = submission_in(tmp_path, command_prefix=["apptainer", "exec"])
    assert submit(submission, settings) == ["12_0", "12_1"] == submission.ids("12")
    assert os.environ["SLURM_NTASKS"] == "5"
    environment = (tmp_path / "bin" / "sbatch.env").read_text()
    assert "SLURM_NTASKS" not in environment and "SLURM_CONF=/etc/slurm.conf" in environment
    for name in ("12_0_submitted.pkl", "12_1_submitted.pkl"):
        pickled = (submission.folder / name).read_bytes()
        words = [arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str)]
        modules = {word for word in words if re.fullmatch(r"[\w.]+", word)}
        assert "os" in modules and not any(
            word.split(".")[0] == "sdx" for word in modules - {"sdx.train"}
        )
        function = pickle.loads(pickled)
        assert function.function is os.execvp
        assert function.args[1][:2] == ["apptainer", "exec"]
    assert (submission.folder.stat().st_mode & 0o777) == 0o700
    files = [path for path in submission.folder.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    script = (submission.folder / "12_submission.sh").read_text()
    assert script == render(submission, settings), "what a dry run shows is what is handed in"


def test_sbatch_is_quoted_where_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = 'echo "sbatch: error: invalid account specified" >&2; exit 1'
    monkeypatch.setenv("PATH", put_on_path(tmp_path / "bin", sbatch=sbatch, srun="exit 1"))
    submission, settings = submission_in(tmp_path)
    with pytest.raises(LaunchError, match="sbatch: error: invalid account specified"):
        submit(submission, settings)


if __name__ == "__main__":
    for name in SCRIPTS:
        (GOLDEN / f"{name}.sh").write_text(shown(name))
