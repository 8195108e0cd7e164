"""What the script of a SLURM job does after its processes have ended: goes on, or says why not.

Started by that script with the job's folder and srun's exit code. A job that was told to stop (time
limit, preemption) or that crashed goes back into the queue, each up to its limit; one that failed,
was asked to end or is being ended by the scheduler does not. Which it was is in `ended.json` beside
the job's other files, for those who look where there is no accounting.

srun gives the highest exit code of its processes, 128 + N for signal N (srun(1)).
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdx.record.files import now, read_json, write_json
from sdx.record.paths import RunPaths
from sdx.record.stop_request import read_stop
from sdx.record.store import as_path
from sdx_launchers import slurm_queue
from sdx_launchers.launch_record import read_job, read_launch
from sdx_launchers.slurm_queue import SchedulerError
from sdx_launchers.slurm_script import COUNTS, ENDED, SRUN_FAILED, STOPPED

_SIGNALLED = 128
_STOPPED = {75, *(_SIGNALLED + s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))}
_GONE_WITHIN_S = 300.0  # a requeued job's script is ended by SLURM
_OF_TASKS = re.compile(r"srun: error: (\S+: tasks? .+)")
_OF_SRUN = re.compile(r"srun: error: (.+)")
_TAIL_BYTES = 1 << 16


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--max-requeues", type=int, required=True)
    parser.add_argument("--retries", type=int, required=True)
    given = parser.parse_args(arguments)
    limits = {"requeues": given.max_requeues, "retries": given.retries}
    reason = why_not(given.folder, given.code, limits)
    if reason is None:
        reason = _requeue()
    id = job_id(os.environ)
    write_json(given.folder / ENDED, {"id": id, "code": given.code, "reason": reason, "at": now()})
    if given.code:
        print(f"sdx: job {id} ended with exit code {given.code}: {reason}", flush=True)


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


def why_not(folder: Path, code: int, limits: Mapping[str, int]) -> str | None:
    """Why the job does not go on, as a line for people; None, and one more counted, if it does."""
    kind, said = kind_of(code), _said(code, folder)
    if kind is None:
        return said
    if (asked := _asked_to_end(folder)) is not None:
        return asked
    if _state() not in (None, "RUNNING"):
        return f"{said}; the scheduler is ending it"
    counts = read_json(folder / COUNTS) or {}
    counts = {name: int(counts.get(name, 0)) for name in limits}
    if counts[kind] >= limits[kind]:
        key = {"requeues": "max_requeues", "retries": "retries"}[kind]
        return f"{said}; it went on {counts[kind]} times before (hydra.launcher.{key})"
    counts[kind] += 1
    write_json(folder / COUNTS, counts)
    print(f"sdx: {said}; requeued, {counts[kind]} of at most {limits[kind]} {kind}", flush=True)
    return None


def _said(code: int, folder: Path) -> str:
    """What became of the processes, with the last one that srun names."""
    if code == 0:
        return "finished"
    if code == 75:
        return "interrupted"
    what = f"exit code {code}"
    if code == SRUN_FAILED:
        what = "srun could not start the processes, or lost a node"
    elif code > _SIGNALLED:
        number = code - _SIGNALLED
        known = {int(s) for s in signal.Signals}
        what = f"ended by {signal.Signals(number).name if number in known else f'signal {number}'}"
    named = _last_in_log(folder, _OF_SRUN if code == SRUN_FAILED else _OF_TASKS)
    return f"{what} ({named})" if named else what


def _last_in_log(folder: Path, pattern: re.Pattern[str]) -> str:
    logs = (read_launch(folder) or {}).get("logs")
    try:
        if not logs:
            return ""
        with open(logs[0], "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            found = pattern.findall(file.read().decode(errors="replace"))
    except OSError:
        return ""
    return found[-1].strip() if found else ""


def _asked_to_end(folder: Path) -> str | None:
    """The words of whoever asked; a time limit and a preemption come as signals instead."""
    if (folder / STOPPED).exists():
        return "stopped by its sweep"
    job = read_job(folder)
    if job is None or job["command"] != "train":
        return None
    request = read_stop(RunPaths(as_path(job["run"])))
    return None if request is None else request.reason or request.status.name


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
