"""The acts of a run in order: prepare, take the folder, compile, restore, train, draw, judge.

From the moment the folder is taken, whatever happens is written down: status.json says finished,
interrupted or failed, attempts/<n>.json what this start did, log.txt what it said.
"""

import sys
import traceback
from collections.abc import Sequence

from sdx.config.errors import ConfigError
from sdx.config.schema import Config
from sdx.data.source import DataError
from sdx.experiment.attempt import FAILED, FINISHED, Attempt, ExportFailed, FolderLost
from sdx.experiment.exporting import EXPORT_FAULTS, complete_export, is_export_due
from sdx.experiment.publishing import PublishError
from sdx.experiment.setup import REFUSALS, Setup, prepare
from sdx.experiment.taking import take_folder
from sdx.parallel.distributed import start_processes
from sdx.parallel.stopping import StopFlag
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

    with StopFlag(on_exit) as stop:
        try:
            with stop.compiling():  # scanning a folder of images can take minutes
                start_processes(config.distributed, config.hardware)
                setup = prepare(config)
                try:
                    record = take_folder(setup, overrides)
                except AlreadyFinished as finished:
                    print(finished)
                    return _complete_export(setup)
                attempts.append(Attempt(setup, record, stop))
        except (ConfigError, *REFUSALS) as error:
            print(error if isinstance(error, ConfigError) else f"sdx: {error}", file=sys.stderr)
            return REFUSED
        return _attempted(attempts[0])


def _attempted(attempt: Attempt) -> int:
    try:
        return attempt.run()
    except _FAULTS as error:
        return attempt.fail(str(error))
    except Exception as error:
        attempt.log.write(traceback.format_exc())
        traceback.print_exc()
        return attempt.fail(f"{type(error).__name__}: {error}")


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
