"""What a process knows of the sweep that launched it: its job, and whether the sweep still lives.

A launcher names the file of the job in the environment; one whose jobs end with it hands down the
reading end of a pipe as well, which nothing is ever written to.
"""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sdx.record.files import read_json

JOB, PIPE = "SDX_JOB", "SDX_DRIVER_PIPE"
"""Variables: the path of job.json, and the number of the pipe's descriptor."""
NODES = "SDX_NODES"
"""Variable: the nodes of a job, from a launcher whose scheduler does not tell them."""
_SCHEDULER = (
    "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT",
    "SLURM_JOB_NODELIST", NODES,
)  # fmt: skip
ENDED_WITH_RUN = "sdx: ended with the whole run"
"""How a process begins its last line when another one of its run failed."""
PATIENCE_S = 300.0  # to save in, when the sweep is gone


@dataclass(frozen=True)
class LaunchedJob:
    """Of which sweep this process is a job; `overrides` are what a person typed for it."""

    sweep: str
    launcher: str
    overrides: tuple[str, ...]


def launched_job() -> LaunchedJob | None:
    """The job that this process is, None where a person started it."""
    path = os.environ.get(JOB)
    fields = None if path is None else read_json(Path(path))
    if fields is None:
        return None
    return LaunchedJob(fields["sweep"], fields["launcher"], tuple(fields["overrides"]))


def scheduler_ids() -> dict[str, str]:
    """What the scheduler calls this job, and where it put it, by its own variables."""
    return {name: os.environ[name] for name in _SCHEDULER if name in os.environ}


def end_with_driver() -> None:
    """From here on this process is asked to save and end when the one that launched it is gone, and
    ended when it has not within `PATIENCE_S`."""
    if PIPE not in os.environ:
        return
    pipe = int(os.environ.pop(PIPE))

    def watch() -> None:
        os.read(pipe, 1)  # returns at the end of the pipe
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="sdx-driver", daemon=True).start()
