"""Taking the run folder: what a start finds there, what changed since, the parent of a fork."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdx.config.compose import from_saved, to_yaml
from sdx.config.errors import ConfigError
from sdx.config.identity import differences
from sdx.config.leaves import flatten, spelled, value
from sdx.config.schema import Config, OnResume
from sdx.experiment.setup import Setup
from sdx.parallel.agreement import from_first
from sdx.parallel.xla_flags import flags_in_force
from sdx.record.files import DamagedRecord, read_json
from sdx.record.lock import RefusedStart
from sdx.record.paths import RunPaths
from sdx.record.run import AlreadyFinished, AnyRecord, Change, FollowedRecord, RunRecord, start
from sdx.record.store import StoreError
from sdx.record.validation import BEST, best_checkpoint, parse_run

# Which arrays a state holds, and in which type.
_STATE_PARTS = ("train.text_encoder", "train.ema", "model.weights_dtype", "optimizer.kind")


@dataclass(frozen=True)
class Taken:
    """A run folder that is this start's to write."""

    record: AnyRecord
    fork: tuple[RunPaths, int | None] | None
    """The run that this one goes on from where it has no checkpoint of its own, and its step, None
    for the newest."""


def take_folder(setup: Setup, overrides: Sequence[str]) -> Taken:
    """Takes the folder, in the first process for all; raises what `record.run.start` does, in all
    processes alike."""
    records: list[RunRecord] = []

    def take() -> dict[str, Any]:
        try:
            fork = _fork_of(setup)
            records.append(_take(setup, overrides))
        except ConfigError as error:
            raise RefusedStart(str(error)) from error
        return {"attempt": records[0].attempt, "step": records[0].step, "fork": fork and fork[1]}

    told = from_first(take, (AlreadyFinished, RefusedStart, DamagedRecord, StoreError))
    paths, text = setup.paths, setup.config.run.resume_from
    return Taken(
        records[0] if records else FollowedRecord(paths, told["attempt"], told["step"]),
        None if text is None else (parse_run(text)[0], told["fork"]),
    )


def _take(setup: Setup, overrides: Sequence[str]) -> RunRecord:
    config, paths = setup.config, setup.paths
    changes = _changes(setup)
    record = start(
        paths,
        config_yaml=to_yaml(config),
        config=flatten(config),
        overrides=overrides,
        resume=config.run.resume.name,
        max_steps=setup.max_steps,
        devices=[f"{device.platform}: {device.device_kind}" for device in setup.mesh.devices.flat],
        changes=changes,
        parent=config.run.resume_from,
    )
    for change in changes:
        if change.on_resume == OnResume.warn.name:
            print(f"changed since the last start: {change.path}: {change.old} -> {change.new}")
    record.update(
        data_fingerprint=setup.source.fingerprint,
        data=getattr(setup.source, "provenance", {}),
        weights=setup.weights.provenance(),
        compiler_flags=flags_in_force(),
    )
    return record


def _fork_of(setup: Setup) -> tuple[RunPaths, int | None] | None:
    """What a run without a checkpoint goes on from, None without `run.resume_from`; RefusedStart
    where there is nothing to fork from."""
    text = setup.config.run.resume_from
    if text is None or any(p.name.isdigit() for p in setup.paths.checkpoints.glob("*")):
        return None
    parent, step = parse_run(text)
    if step == BEST:
        step = best_checkpoint(parent)
        if step is None:
            raise RefusedStart(
                f"run.resume_from={text}: none of its checkpoints was measured (eval.every); use "
                "RUN or RUN@STEP."
            )
    there = sorted(int(p.name) for p in parent.checkpoints.glob("*") if p.name.isdigit())
    if not there or step not in (None, *there):
        found = f"it has the steps {', '.join(map(str, there))}" if there else "no checkpoint there"
        raise RefusedStart(f"run.resume_from={text}: {found}; use RUN, RUN@STEP or RUN@best.")
    _check_same_parts(setup.config, text, parent)
    return parent, step


def _check_same_parts(config: Config, text: str, parent: RunPaths) -> None:
    """Raises RefusedStart where the state of the run to fork has other parts than that of ours."""
    try:
        saved = from_saved(parent.config)
    except ConfigError:  # no record, or one not readable today: restoring compares every array
        return
    pairs = {path: (value(saved, path), value(config, path)) for path in _STATE_PARTS}
    if other := {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}:
        faults = ", ".join(
            f"{path} is {spelled(there)} there, {spelled(here)} here"
            for path, (there, here) in other.items()
        )
        raise RefusedStart(
            f"run.resume_from={text}: its state has other parts: {faults}; leave that as it is "
            f"there, or start from its weights alone: model.pretrained={parent.export} for all "
            f"of them, model.unet_checkpoint={parent.root} for the UNet."
        )


def _changes(setup: Setup) -> list[Change]:
    """What differs from the start before: keys of the configuration, and the data itself."""
    paths = setup.paths
    if not paths.config.is_file():
        return []
    changes = [
        Change(change.path, change.old, change.new, change.on_resume.name)
        for change in differences(from_saved(paths.config), setup.config)
    ]
    before, content = (read_json(paths.run) or {}).get("data_fingerprint"), setup.source.fingerprint
    if before not in (None, content):  # other indices name other images
        changes.append(Change("content of data", before, content, OnResume.forbidden.name))
    return changes
