"""The batch script of a submission, rendered and handed in by submitit.

submitit's function is `os.execvp`, so that its pickle names nothing of sdx and what runs is the
job's own command line. Jobs are handed in held: whatever dies between that and the record of their
ids leaves jobs that never start. What follows srun in the script is slurm/after.py's.
"""

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from sdx.config.launching import SlurmSettings
from sdx_launchers.jobs import Job, LaunchError
from sdx_launchers.launch_record import job_command
from sdx_launchers.slurm import queue as slurm_queue
from sdx_launchers.slurm.after import BEGINS, ENDED, SRUN_FAILED, STOPPED
from sdx_launchers.slurm.queue import SchedulerError
from sdx_launchers.slurm.request import Request

_AFTER = "sdx_launchers.slurm.after"
_IMPOSSIBLE = "Requested node configuration is not available"
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class Submission:
    """Jobs that are handed in as one: a plain job, or an array."""

    name: str
    """As squeue shows it, no other submission has it."""
    folder: Path
    """Scripts, pickles and logs, 0700."""
    jobs: Sequence[Job]
    request: Request
    max_parallel: int | None
    python_path: Sequence[PurePath]

    def commands(self, settings: SlurmSettings) -> list[list[str]]:
        """The argv of each job's processes."""
        return [
            [*settings.command_prefix, *job_command(job, self.python_path, settings.python)]
            for job in self.jobs
        ]

    def ids(self, id: str) -> list[str]:
        """Of its jobs, where sbatch answered `id`."""
        return [id] if len(self.jobs) == 1 else [f"{id}_{n}" for n in range(len(self.jobs))]

    def logs(self, id: str) -> list[Path]:
        """Of the processes of the job with this id; srun's and the script's words are in the
        first one."""
        count = self.request.nodes * self.request.tasks_per_node
        return [self.folder / f"{id}_{process}_log.out" for process in range(count)]


def render(submission: Submission, settings: SlurmSettings) -> str:
    """The script, to the letter; needs no SLURM here."""
    executor = _executor(submission, settings)
    if len(submission.jobs) > 1:
        executor.parameters["map_count"] = len(submission.jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def check_possible(submission: Submission, settings: SlurmSettings) -> None:
    """Raises LaunchError where no node of the cluster, busy or not, has what the jobs ask for;
    sbatch takes held ones all the same, and they would wait for ever."""
    with tempfile.TemporaryDirectory() as aside:
        script = Path(aside) / "script.sh"
        script.write_text(render(submission, settings))
        try:
            with _outside_of_jobs():
                slurm_queue.call("sbatch", "--test-only", str(script))
        except SchedulerError as error:  # others may pass, or are said again at submission
            if _IMPOSSIBLE in str(error):
                raise LaunchError(f"sbatch: {error}") from None


def submit(submission: Submission, settings: SlurmSettings) -> list[str]:
    """Hands all jobs in, held; their ids.

    Raises:
        LaunchError: in the words of sbatch. A job may be queued nevertheless, under its name.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = _executor(submission, settings)
    commands = submission.commands(settings)
    try:
        submission.folder.mkdir(mode=0o700, parents=True)
        with _outside_of_jobs():
            if len(commands) == 1:
                handed_in = [executor.submit(os.execvp, commands[0][0], commands[0])]
            else:
                handed_in = executor.map_array(os.execvp, [argv[0] for argv in commands], commands)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        raise LaunchError(_words(error)) from error
    return [str(job.job_id) for job in handed_in]


def discard(submission: Submission) -> None:
    """Removes the files of a submission that came to nothing."""
    shutil.rmtree(submission.folder, ignore_errors=True)


def _executor(submission: Submission, settings: SlurmSettings) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # scripts are rendered where there is no srun

    # The job's Python may be one that only its container has.
    python = sys.executable if settings.command_prefix else settings.python or sys.executable
    executor = Executor(submission.folder, python=f"{shlex.quote(python)} -P")
    executor.update_parameters(**_parameters(submission, settings))
    return executor


def _parameters(submission: Submission, settings: SlurmSettings) -> dict[str, Any]:
    """By submitit's names, which are mostly those of sbatch."""
    request, cpus, memory = submission.request, settings.cpus_per_task, settings.mem_gib
    parameters = {
        "job_name": submission.name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks_per_node,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": cpus,
        "mem": None if memory is None else f"{round(memory * 1024)}M",
        "exclusive": settings.exclusive or None,
        "time": settings.timeout_min,
        "signal_delay_s": settings.signal_delay_s,
        "array_parallelism": submission.max_parallel or len(submission.jobs),
        "stderr_to_stdout": True,
        "additional_parameters": {
            "hold": True,
            "requeue": True,
            **settings.additional_parameters,
        },
        "srun_args": [
            "--kill-on-bad-exit=1",
            *([] if cpus is None else [f"--cpus-per-task={cpus}"]),  # not inherited since 22.05
            *settings.srun_args,
        ],
        "setup": [*settings.setup, *_before(submission, settings)],
        "teardown": _after(submission, settings),
    }
    return {"wckey": None} | {key: v for key, v in parameters.items() if v is not None}


def _before(submission: Submission, settings: SlurmSettings) -> list[str]:
    """Lines that name the job's folder and keep a job that must not start from starting."""
    folders = " ".join(shlex.quote(str(job.folder)) for job in submission.jobs)
    limit = settings.max_requeues + settings.retries
    return [
        "set +eu",
        f"sdx_folders=({folders})",
        'sdx_folder="${sdx_folders[${SLURM_ARRAY_TASK_ID:-0}]}"',
        f'rm -f "$sdx_folder/{ENDED}"',
        f'[ ! -e "$sdx_folder/{STOPPED}" ] || exit 75',
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {limit} ]; then',
        f'  echo "sdx: restarted $SLURM_RESTART_COUNT times, {limit} are allowed; not again."',
        "  exit 1",
        "fi",
        f"export SLURM_EXIT_ERROR={SRUN_FAILED}",
        "trap : TERM USR2",  # what comes to all processes of a job ends srun's alone
        f'echo; echo "{BEGINS}${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID '
        'on $SLURM_JOB_NODELIST"',
    ]


def _after(submission: Submission, settings: SlurmSettings) -> list[str]:
    path = ":".join(str(part) for part in submission.python_path)
    command = ["/usr/bin/env", f"PYTHONPATH={path}", sys.executable, "-P", "-m", _AFTER]
    limits = [f"--max-requeues={settings.max_requeues}", f"--retries={settings.retries}"]
    return [
        "sdx_code=$?",
        f'{shlex.join(command)} "$sdx_folder" "$sdx_code" {shlex.join(limits)}',
        "sdx_cause=$?",
        '[ "$sdx_code" -eq 0 ] || [ "$sdx_cause" -eq 0 ] || sdx_code=$sdx_cause',
        'exit "$sdx_code"',
    ]


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Within it, what a job of SLURM has in its environment is not handed to the jobs it hands
    in: srun would take it for its options."""
    inherited = {}
    if "SLURM_JOB_ID" in os.environ:
        names = [name for name in os.environ if name.startswith("SLURM_") and name not in _KEPT]
        inherited = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= inherited


def _words(error: Exception) -> str:
    """What sbatch said, from submitit's error, without the traceback around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line.startswith("sbatch:")]
    return " ".join(said) or " ".join(lines)[-1000:]
