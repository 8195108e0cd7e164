"""Jobs that were started before: how they go, what they say, and ending them.

Whoever looks asks the schedulers whose jobs outlive the process that started them; everything else
is on record. Nothing is started here, and nothing ended that is not a job of what was named.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.live import Live

from sdx.config.compose import from_saved
from sdx.config.launching import LAUNCHERS, TpuSettings
from sdx.config.schema import Config
from sdx.record.owner import Owner, lives_here
from sdx.record.redact import said_by
from sdx.record.status import Status
from sdx.record.stop_request import read_stop, request_stop
from sdx.record.store import AnyPath
from sdx_launchers.jobs import Ended, Handle, Job, Launcher
from sdx_launchers.launch_record import (
    CONFIG,
    SWEEPS,
    read_job,
    read_launch,
    read_outcome,
    write_outcome,
)
from sdx_launchers.places import make_launcher
from sdx_launchers.runs.facts import RunFacts
from sdx_launchers.runs.found import Found, NothingFound, find
from sdx_launchers.runs.job_logs import FollowedLogs, last_lines, logs_of
from sdx_launchers.runs.summary import write_table
from sdx_launchers.runs.table import RunsTable, print_table, render, shown, tabulate
from sdx_launchers.saying import say
from sdx_launchers.sweep.objective import Objective
from sdx_launchers.sweep.process import ask_to_cancel, is_running
from sdx_launchers.sweep.standing import settle

LOOK_EVERY_S = 2.0
_LOCAL = "sdx_local"
_LINES = 20
_BY_PERSON = "sdx.runs --cancel"

Say = Callable[[str], None]


class Watch:
    """Runs looked at again and again; what has ended is read once."""

    def __init__(self, place: AnyPath, objective: Objective | None = None):
        self.found = find(place)
        self._place = place
        self._objective = objective
        self._runs: Sequence[RunFacts] = ()
        self._launchers: dict[str, Launcher] = {}
        self._handles: dict[tuple[str, str], Handle | None] = {}

    def look(self) -> RunsTable:
        """The runs as they are; a job that its scheduler still knows is queued at least."""
        self.found = find(self._place)
        table = tabulate(self.found, self._objective, self._runs)
        for run in table.runs:
            handle = self.handle(run)
            if handle is not None and run.status != Status.running.name:
                run.status, run.reason = Status.queued.name, None
        self._runs = table.runs
        return table

    @property
    def goes_on(self) -> bool:
        """Whether something runs or waits, as of the last look."""
        if any(run.goes_on for run in self._runs):
            return True
        if self.sweep_folder is not None:
            return is_running(self.sweep_folder)
        place = self.found.place  # of outputs: a sweep that is between two jobs
        return isinstance(place, Path) and any(map(is_running, (place / SWEEPS).glob("*")))

    @property
    def sweep_folder(self) -> Path | None:
        """Of the sweep that is watched, if it is one."""
        place = self.found.place
        return place if self.found.sweep is not None and isinstance(place, Path) else None

    def handle(self, run: RunFacts) -> Handle | None:
        """The job of a run, where its scheduler goes on with it by itself."""
        launcher, folder = self._launcher(run), run.found.launch
        if launcher is None or folder is None or not launcher.outlives_driver:
            return None
        if read_outcome(folder) is not None or run.launch.get("released") is False:
            return None  # ended, or just being handed in by a sweep
        key = (run.name, str(run.launch.get("id")))
        try:
            if key not in self._handles:
                self._handles[key] = launcher.attach(_job(run), run.launch)
            handle = self._handles[key]
            ended = None if handle is None else handle.poll()
        except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            run.faults.append(f"launch.json: its launcher cannot be asked ({said_by(error)})")
            return None
        if handle is not None and ended is not None:
            self._handles[key] = None
            if read_launch(folder) == run.launch:  # else it was handed over once more since
                _note(handle.job, ended)
        return self._handles[key]

    def _launcher(self, run: RunFacts) -> Launcher | None:
        name = str(run.launch.get("launcher"))
        if name in LAUNCHERS and name not in self._launchers:  # what it is asked needs no settings
            self._launchers[name] = make_launcher(name, LAUNCHERS[name]())
        return self._launchers.get(name)


def show(watch: Watch, *, follows: bool) -> bool:
    """Prints the table, and brings a sweep's summary up to date; `follows` until all has ended.

    Whether a followed run failed.
    """
    console = Console(highlight=False)
    table = _follow(watch, console) if follows else watch.look()
    if not (follows and console.is_terminal):
        print_table(table, console)
    folder = watch.sweep_folder
    if folder is not None:
        try:
            write_table(folder, table)
        except OSError as error:
            say(f"sdx: {folder}: no summary written ({error.strerror})", aside=True)
        else:
            say(f"{folder}: summary.csv, summary.json, summary.md, curves.png")
    return follows and any(run.status == Status.failed.name for run in table.runs)


def _follow(watch: Watch, console: Console) -> RunsTable:
    """Until all runs have ended; without a terminal a line for each change."""
    table = watch.look()
    if not console.is_terminal:
        return _follow_in_lines(watch, table)
    with Live(render(table, console), console=console, auto_refresh=False) as live:
        while watch.goes_on:
            time.sleep(LOOK_EVERY_S)
            table = watch.look()
            live.update(render(table, console), refresh=True)
    return table


def _follow_in_lines(watch: Watch, table: RunsTable) -> RunsTable:
    said: dict[str, str] = {}
    while True:
        for run in table.runs:
            if said.get(run.name) != run.status:
                said[run.name] = run.status
                last = shown(table.last_of(run))
                value = f", {table.objective.metric} {last}" if last else ""
                say(f"{run.name}: {run.status}, step {run.step}{value}")
        if not watch.goes_on:
            return table
        time.sleep(LOOK_EVERY_S)
        table = watch.look()


def show_logs(watch: Watch, say: Say, *, follows: bool) -> None:
    """The last lines of each job's log, and where its logs are; `follows` what is added to them
    until all jobs have ended."""
    runs = watch.look().runs
    if not follows:
        for run in runs:
            logs = logs_of(run)
            say(f"==> {run.name} ({run.status}): {', '.join(map(str, logs)) or 'no log yet'} <==")
            for line in last_lines(logs[0], _LINES) if logs else ():
                say(line)
        return
    logs = FollowedLogs(say)
    while True:
        goes_on = watch.goes_on
        logs.look(runs, _LINES)
        if not goes_on:
            return
        time.sleep(LOOK_EVERY_S)
        runs = watch.look().runs


def cancel(watch: Watch, say: Say) -> None:
    """Asks every job that runs or waits to save and end as cancelled, and the sweep to start no
    others; in an outputs folder that is the one sweep that goes on. Asked a second time, jobs are
    ended as they are.

    Raises:
        NothingFound: several sweeps go on.
    """
    runs = watch.look().runs
    if watch.sweep_folder is None and watch.found.place != runs[0].found.paths.root:
        sweeps = _going_on(watch.found.place, runs)
        if len(sweeps) != 1:
            raise NothingFound(
                f"{watch.found.place}: {len(sweeps)} sweeps go on there; --cancel takes the folder "
                f"of a run or of a sweep: {', '.join(map(str, sweeps)) or 'outputs/sweeps/NAME'}."
            )
        return cancel(Watch(sweeps[0]), say)
    if watch.sweep_folder is not None and is_running(watch.sweep_folder):
        ask_to_cancel(watch.sweep_folder)
        say(f"{watch.found.sweep}: its process starts no more jobs")
    for run in runs:
        say(f"{run.name}: {_cancel(watch, run)}")


def _going_on(place: AnyPath, runs: Sequence[RunFacts]) -> list[Path]:
    """The sweeps of an outputs folder that run, or have jobs that do."""
    if not isinstance(place, Path):
        return []
    jobs = [read_job(run.found.launch) for run in runs if run.goes_on and run.found.launch]
    names = {str(job["sweep"]) for job in jobs if job is not None}
    folders = sorted(path for path in (place / SWEEPS).glob("*") if path.is_dir())
    return [path for path in folders if path.name in names or is_running(path)]


def sweep_up(say: Say) -> bool:
    """Deletes TPUs of this user that no launcher vouches for; whether some could not be."""
    from sdx_launchers.tpu.strays import sweep_up as search

    found = search(TpuSettings())
    say(str(found))
    return bool(found.faults)


def _cancel(watch: Watch, run: RunFacts) -> str:
    if not run.goes_on:
        return f"{run.status}, nothing to cancel"
    if (owner := _other_sweep(watch.found, run)) is not None:
        return f"left alone, {owner}"
    paths, is_run = run.found.paths, run.status == Status.running.name
    asked = read_stop(paths) if is_run else None
    is_again = asked is not None and asked.status is Status.cancelled
    if is_run and not is_again:
        request_stop(paths, Status.cancelled, _BY_PERSON)
    handle = watch.handle(run)
    if handle is not None:
        for _ in range(1 + is_again):
            handle.stop()
    elif is_again or not is_run:
        if not _signal(run, signal.SIGKILL if is_again else signal.SIGTERM):
            return "asked before" if is_again else "waits in the process of its sweep; cancel that"
    return "ended" if is_again else "asked to save and end"


def _signal(run: RunFacts, number: signal.Signals) -> bool:
    """Sends it to a job that is a process of this machine; False where there is none."""
    process = run.launch.get("process")
    if run.launch.get("launcher") != _LOCAL or process is None:
        return False
    owner = Owner(**process)
    if not lives_here(owner):
        return False
    kill = os.killpg if number is signal.SIGKILL else os.kill  # with all that it has started
    kill(owner.pid, number)
    return True


def _other_sweep(found: Found, run: RunFacts) -> str | None:
    """Whose job it is, if not of the sweep that was named."""
    job = None if run.found.launch is None else read_job(run.found.launch)
    if found.sweep is None or (job is not None and job["sweep"] == found.sweep):
        return None
    return "no sweep started it" if job is None else f"it is a job of the sweep {job['sweep']}"


def _note(job: Job, ended: Ended) -> None:
    """Writes down how a job ended while nobody looked, as its sweep would have."""
    try:
        whole = replace(job, config=from_saved(job.folder / CONFIG))
        write_outcome(job, settle(whole, ended, None))
    except (OSError, ValueError) as error:
        say(f"sdx: {job.name}: its end is not on record ({said_by(error)})", aside=True)


def _job(run: RunFacts) -> Job:
    """What launchers must know of a job to find it: its configuration, a fifth of a second to read,
    is none of that."""
    folder = run.found.launch
    assert folder is not None
    return Job(
        name=run.name,
        command=run.found.command,
        config=cast(Config, None),
        overrides=run.overrides,
        paths=run.found.paths,
        folder=folder,
        sweep=str((read_job(folder) or {}).get("sweep")),
    )
