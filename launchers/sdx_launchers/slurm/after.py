"""What the script of a SLURM job does after its processes have ended: goes on, or says why not.

Started by that script with the job's folder and srun's exit code. A job that was told to stop (time
limit, preemption) or that crashed goes back into the queue, each up to its limit; one that failed,
was asked to end or is being ended by the scheduler does not. Which it was is in `ended.json` beside
the job's other files, for those who look where there is no accounting.

srun's exit code is the highest of its processes, 128 + N for signal N (srun(1)), and it ends the
others when one ends badly: which was the first, its messages tell.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdx.record.files import now, read_json, write_json
from sdx.record.paths import RunPaths
from sdx.record.stop_request import read_stop
from sdx.record.store import as_path
from sdx_launchers.slurm import queue as slurm_queue
from sdx_launchers.slurm.queue import SchedulerError

ENDED, STOPPED, COUNTS = "ended.json", "stopped", "requeues.json"
"""Files in a job's folder: how it ended, that it must not go on, how often it went on."""
BEGINS = "sdx: start "
"""How a start begins in the log that all starts of a job share."""
SRUN_FAILED = 121
"""Exit code of a srun that could not start the processes, or lost their node."""
_JOB, _LAUNCH = "job.json", "launch.json"  # of launch_record.py, which takes longer to import
_SIGNALLED = 128
_STOPPED = {75, *(_SIGNALLED + s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))}
_GONE_WITHIN_S = 300.0  # a requeued job's script is ended by SLURM
_OF_TASK = re.compile(r"srun: error: (\S+: tasks? [\d,-]+: (.+))")
_OF_SRUN = re.compile(r"srun: error: (.+)")
_EXITED = re.compile(r"Exited with exit code (\d+)")
_TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class Cause:
    """Why the processes ended: an exit code as a shell gives it, and in words."""

    code: int
    said: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--max-requeues", type=int, required=True)
    parser.add_argument("--retries", type=int, required=True)
    given = parser.parse_args(arguments)
    limits = {"requeues": given.max_requeues, "retries": given.retries}
    cause = cause_of(given.code, _log(given.folder))
    reason = why_not(given.folder, cause, limits) or _requeue()
    id = job_id(os.environ)
    write_json(given.folder / ENDED, {"id": id, "code": cause.code, "reason": reason, "at": now()})
    if cause.code:
        print(f"sdx: job {id} ended with exit code {cause.code}: {reason}", flush=True)
    return cause.code


def job_id(environment: Mapping[str, str]) -> str:
    """As squeue shows it."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def kind_of(code: int) -> str | None:
    """`requeues` for processes that were told to stop, `retries` for those that crashed or whose
    node was lost; None where to do the same again would come to the same."""
    if code in _STOPPED:
        return "requeues"
    return "retries" if code == SRUN_FAILED or code > _SIGNALLED else None


def cause_of(code: int, log: str) -> Cause:
    """What srun's exit code stands for, with the process that was first to end badly."""
    if code == 0:
        return Cause(0, "finished")
    if code == SRUN_FAILED:
        found = _OF_SRUN.findall(log)
        return Cause(code, _with("srun could not start the processes, or lost some", found[:1]))
    found = _OF_TASK.findall(log)
    if not found:
        return Cause(code, _words(code))
    named, how = found[0]
    exited = _EXITED.match(how)
    code = int(exited[1]) if exited else _SIGNALLED + _number(how)
    return Cause(code, _with(_words(code), [named]))


def why_not(folder: Path, cause: Cause, limits: Mapping[str, int]) -> str | None:
    """Why the job does not go on, as a line for people; None, and one more counted, if it does."""
    kind = kind_of(cause.code)
    if kind is None:
        return cause.said
    if (asked := _asked_to_end(folder)) is not None:
        return asked
    if _state() not in (None, "RUNNING"):
        return f"{cause.said}; the scheduler is ending it"
    counts = read_json(folder / COUNTS) or {}
    counts = {name: int(counts.get(name, 0)) for name in limits}
    if counts[kind] >= limits[kind]:
        key = {"requeues": "max_requeues", "retries": "retries"}[kind]
        return f"{cause.said}; it went on {counts[kind]} times before (hydra.launcher.{key})"
    counts[kind] += 1
    write_json(folder / COUNTS, counts)
    said = f"{cause.said}; requeued, {counts[kind]} of at most {limits[kind]} {kind}"
    print(f"sdx: {said}", flush=True)
    return None


def _words(code: int) -> str:
    if code == 75:
        return "interrupted"
    if code <= _SIGNALLED:
        return f"exit code {code}"
    number = code - _SIGNALLED
    names = {int(known): known.name for known in signal.Signals}
    return f"ended by {names.get(number, f'signal {number}')}"


def _with(what: str, names: Sequence[str]) -> str:
    return f"{what} ({names[0].strip()})" if names else what


def _number(how: str) -> int:
    """The signal that srun describes so; SIGKILL for what it says of memory."""
    for number in signal.Signals:
        if how.startswith(signal.strsignal(number) or "\n"):
            return int(number)
    return int(signal.SIGKILL)


def _log(folder: Path) -> str:
    """What srun and the processes beside it said since this start."""
    logs = (read_json(folder / _LAUNCH) or {}).get("logs")
    if not logs:
        return ""
    try:
        with open(logs[0], "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").rpartition(f"\n{BEGINS}")[2]
    except OSError:
        return ""


def _asked_to_end(folder: Path) -> str | None:
    """The words of whoever asked; a time limit and a preemption come as signals instead."""
    job = read_json(folder / _JOB)
    if job is not None and job["command"] == "train":
        request = read_stop(RunPaths(as_path(job["run"])))
        if request is not None:
            return request.reason or request.status.name
    return "stopped" if (folder / STOPPED).exists() else None


def _state() -> str | None:
    """RUNNING unless the job is being cancelled, or requeued by another; None if not known."""
    try:
        text = slurm_queue.call("scontrol", "show", "job", "--oneliner", job_id(os.environ))
    except SchedulerError:
        return None
    match = re.search(r"\bJobState=(\w+)", text)
    return None if match is None else match[1]


def _requeue() -> str:
    """Does not return where the job goes on: SLURM ends this process with it."""
    try:
        slurm_queue.call("scontrol", "requeue", job_id(os.environ))
    except SchedulerError as error:
        return f"could not be requeued: {error}"
    deadline = time.monotonic() + _GONE_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(1)
    return "requeued, and not ended by SLURM"


if __name__ == "__main__":
    sys.exit(main())
