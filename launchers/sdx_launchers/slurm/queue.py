"""What the scheduler says of jobs: one squeue for all of them, and sacct for those that left it.

A scheduler that does not answer is asked again: jobs are never called lost because of it. Sites
without accounting have no sacct that answers; what is not known then, the files of the job tell.
"""

import os
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass

from sdx_launchers.saying import say

_TIMEOUT_S = 120.0
_GOES_ON = {
    "CONFIGURING", "COMPLETING", "PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING",
    "RESV_DEL_HOLD", "RUNNING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED",
}  # fmt: skip
_HELD = ("held", "Held")  # in the reason of a job that waits for a person


class SchedulerError(RuntimeError):
    """A command of SLURM that did not do what it was asked; the text is what it said."""


@dataclass(frozen=True)
class JobState:
    """By SLURM's names: RUNNING, COMPLETED, CANCELLED, …; `reason` is why it waits."""

    state: str
    reason: str = ""

    @property
    def goes_on(self) -> bool:
        return self.state in _GOES_ON

    @property
    def is_waiting(self) -> bool:
        return self.state == "PENDING"

    @property
    def is_held(self) -> bool:
        return self.is_waiting and any(word in self.reason for word in _HELD)


class Queue:
    """States of jobs, at most `fresh_s` old; all that are asked for come with one command."""

    def __init__(self, fresh_s: float):
        self._fresh_s = fresh_s
        self._asked: set[str] = set()
        self._states: dict[str, JobState] = {}
        self._looked_at: float | None = None
        self._is_silent = False

    @property
    def is_silent(self) -> bool:
        """Whether the scheduler did not answer when it was asked last."""
        return self._is_silent

    def state(self, id: str) -> JobState | None:
        """None for a job that SLURM does not know, or that it has not told of while silent."""
        is_new = id not in self._asked
        self._asked.add(id)
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at >= self._fresh_s:
            self._look()
            self._looked_at = time.monotonic()
        elif is_new and id not in self._states and not self._is_silent:
            self._states |= _ended({id})
        return self._states.get(id)

    def refresh(self) -> None:
        """What was seen is no longer so: jobs were handed in or taken back."""
        self._looked_at = None

    def forget(self, id: str) -> None:
        """The job has ended, nobody asks for it again."""
        self._asked.discard(id)

    def _look(self) -> None:
        try:
            found = queued()
        except SchedulerError as error:
            self._say(f"sdx: SLURM does not answer ({error}); it is asked again.", is_silent=True)
            return
        self._states = found | _ended(self._asked - found.keys())
        self._say("sdx: SLURM answers again.", is_silent=False)

    def _say(self, text: str, *, is_silent: bool) -> None:
        if is_silent is not self._is_silent:
            say(text, aside=True)
        self._is_silent = is_silent


def _ended(ids: Collection[str]) -> dict[str, JobState]:
    """Jobs that have left the queue, by the accounting; one that says they go on is behind."""
    return {id: state for id, state in accounted(ids).items() if not state.goes_on}


def queued() -> dict[str, JobState]:
    """All jobs of this user in the queue, those included that ended a short while ago."""
    text = call(
        "squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}",
        "--format=%i|%T|%r",
    )  # fmt: skip
    rows = [line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
    return {id: JobState(state, reason) for id, state, reason in rows}


def accounted(ids: Collection[str]) -> dict[str, JobState]:
    """What the accounting knows of these jobs; nothing where there is none."""
    if not ids:
        return {}
    try:
        text = call(
            "sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State",
            f"--jobs={','.join(sorted(ids))}",
        )  # fmt: skip
    except SchedulerError:
        return {}
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 1]
    return {id: JobState(state.split()[0]) for id, state in rows if state}  # CANCELLED by 1000


def named(name: str) -> list[str]:
    """Ids of the jobs of this user that wait or run under that name; an array has one."""
    text = call("squeue", "--noheader", f"--user={os.getuid()}", f"--name={name}", "--format=%A|%F")
    return sorted({line.split("|")[1].strip() for line in text.splitlines() if "|" in line})


def partitions() -> set[str]:
    return set(call("sinfo", "--noheader", "--all", "--format=%R").split())


def cancel(*ids: str) -> None:
    if ids:
        call("scancel", *ids)


def release(id: str) -> None:
    """Lets a job start that was handed in held; one that does already is left alone."""
    call("scontrol", "release", id)


def call(*argv: str) -> str:
    """What the command prints.

    Raises:
        SchedulerError: it is not there, takes too long or fails; in its own words.
    """
    try:
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise SchedulerError(f"there is no {argv[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{argv[0]} took longer than {_TIMEOUT_S:g} s") from None
    if ended.returncode:
        words = (ended.stderr or ended.stdout).strip() or f"exit code {ended.returncode}"
        raise SchedulerError(" ".join(words.split()))
    return ended.stdout
