"""The acts of a run in order: prepare, take the folder, compile, restore, train, draw, judge.

From the moment the folder is taken, whatever happens is written down: status.json says finished,
interrupted or failed, attempts/<n>.json what this start did, log.txt what it said.
"""

import sys
import traceback
from collections.abc import Sequence

from sdx.config import resolve
from sdx.config.errors import ConfigError
from sdx.config.schema import Config
from sdx.data.source import DataError
from sdx.experiment.attempt import FAILED, FINISHED, Attempt, ExportFailed, FolderLost
from sdx.experiment.exporting import EXPORT_FAULTS, complete_export, is_export_due
from sdx.experiment.hosts import (
    check_same_facts,
    check_same_folder,
    facts_of,
    only_first_speaks,
)
from sdx.experiment.publishing import PublishError
from sdx.experiment.setup import REFUSALS, Setup, prepare, run_paths
from sdx.experiment.taking import take_folder
from sdx.parallel.agreement import from_first, leave_to_first
from sdx.parallel.distributed import start_processes
from sdx.parallel.failures import Companions, Failure
from sdx.parallel.place import ProcessesError
from sdx.parallel.stopping import EXIT_INTERRUPTED, StopFlag
from sdx.record.lock import RunLock
from sdx.record.run import AlreadyFinished
from sdx.record.status import read_status
from sdx.record.store import StoreError
from sdx.training.checkpoint import CheckpointMismatch, NoValidCheckpoint
from sdx.training.metrics import TooManyBadSteps

REFUSED = 2

_FAULTS = (
    FolderLost, ExportFailed, TooManyBadSteps, NoValidCheckpoint, CheckpointMismatch, DataError,
    StoreError,
)  # fmt: skip
"""Failures that explain themselves; any other leaves its traceback."""


def run(config: Config, overrides: Sequence[str]) -> int:
    """Trains what `config` says, from where an earlier start stopped; returns the exit code."""
    attempts: list[Attempt] = []

    def on_exit() -> None:
        """Said when a signal ends the process at once."""
        if attempts:
            attempts[0].interrupted_at_once()
        else:
            print("interrupted before the run was touched")

    def on_failure(failure: Failure) -> None:
        """Said and written when this process, or another of the run, cannot go on."""
        if failure.exit_code == EXIT_INTERRUPTED:
            on_exit()
        elif attempts:
            attempts[0].fail(failure.said, failure.trace)
        else:
            print(failure.trace, failure.said, sep="", file=sys.stderr)

    with StopFlag(on_exit) as stop:
        try:
            with stop.compiling():  # others may take minutes to come
                companions = start_processes(config.distributed, config.hardware, on_failure)
                stop.join(companions)
        except ProcessesError as error:
            print(f"sdx: {error}", file=sys.stderr)
            return REFUSED
        with companions, only_first_speaks():
            return _started(resolve.without_place(config), overrides, stop, companions, attempts)


def _started(
    config: Config,
    overrides: Sequence[str],
    stop: StopFlag,
    companions: Companions,
    attempts: list[Attempt],
) -> int:
    """All but how processes begin and end; the attempt goes into `attempts` when there is one."""
    try:
        with stop.compiling():  # scanning a folder of images can take minutes
            check_same_folder(run_paths(config).root.parent, "run.output_dir")
            setup = prepare(config)
            check_same_facts(facts_of(setup))
            try:
                taken = take_folder(setup, overrides)
            except AlreadyFinished as finished:
                print(finished)
                return from_first(lambda: _complete_export(setup))
            attempts.append(Attempt(setup, taken, stop))
    except (ConfigError, *REFUSALS) as error:
        leave_to_first(error)
        reason = str(error) if isinstance(error, ConfigError) else f"sdx: {error}"
        return companions.fail(REFUSED, reason)
    try:
        return attempts[0].run()
    except _FAULTS as error:
        leave_to_first(error)
        return companions.fail(FAILED, str(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return companions.fail(FAILED, reason, trace=traceback.format_exc())


def _complete_export(setup: Setup) -> int:
    """What a finished run still owes: its export, or the upload."""
    config, paths = setup.config, setup.paths
    status = read_status(paths)
    if status is None or not is_export_due(paths, config, status.step):
        return FINISHED
    with RunLock(paths.lock):
        try:
            complete_export(paths, config, print)
        except (*EXPORT_FAULTS, PublishError, OSError) as error:
            print(f"sdx: {error}", file=sys.stderr)
            return FAILED
    return FINISHED
