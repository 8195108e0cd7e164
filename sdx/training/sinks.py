"""Where metrics and pictures of a run go, behind one small interface."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from sdx.config.leaves import spelled
from sdx.config.schema import Sink, WandbConfig
from sdx.parallel.agreement import is_first
from sdx.record.files import read_json
from sdx.record.parts import text_parts
from sdx.record.paths import RunPaths
from sdx.record.store import AnyPath, ObjectPath


class SinkError(ValueError):
    """Somewhere metrics are to go cannot be used on this machine."""


@runtime_checkable
class MetricSink(Protocol):
    """Somewhere metrics and pictures go, steps in order; what is written on this machine is flushed
    when the call returns, what goes to an object store is on its way (`sdx.record.behind`)."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, tag: str, image: UInt8[np.ndarray, "H W 3"]) -> None: ...

    def close(self, exit_code: int = 0) -> None:
        """Nothing more comes; `exit_code` says how the run's start ended."""
        ...


class JsonlSink:
    """One JSON object a line in `metrics.jsonl`; a value that is not finite is null."""

    def __init__(self, path: AnyPath):
        self._parts = text_parts(path) if isinstance(path, ObjectPath) else None
        self._file = None
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step} | row) + "\n"
        if self._parts is not None:
            self._parts.append(line.encode())
        elif self._file is not None:
            self._file.write(line)
            self._file.flush()

    def picture(self, step: int, tag: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Pictures lie in the run folder already."""

    def close(self, exit_code: int = 0) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Told:
    """What sinks know of the run whose rows they get."""

    paths: RunPaths
    first_step: int
    """The first one this start will write: older rows of that number are no longer shown."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration as plain values, without secrets."""
    tags: Sequence[str] = ()
    say: Callable[[str], None] = print


def _tensorboard(told: Told) -> MetricSink:
    from sdx.training.event_files import TensorBoardSink  # costs a second to import

    return TensorBoardSink(told.paths.tensorboard, told.first_step)


def _wandb(told: Told) -> MetricSink:
    from sdx.training.wandb_sink import WandbSink  # the package is an extra

    root = told.paths.root
    return WandbSink(
        told.wandb,
        folder=root if isinstance(root, Path) else None,
        name=root.name,
        created=(read_json(told.paths.run) or {}).get("created", ""),
        config=told.config,
        tags=told.tags,
        say=told.say,
    )


SINKS: dict[Sink, Callable[[Told], MetricSink]] = {
    Sink.jsonl: lambda told: JsonlSink(told.paths.metrics),
    Sink.tensorboard: _tensorboard,
    Sink.wandb: _wandb,
}


def make_sinks(kinds: Sequence[Sink], told: Told) -> list[MetricSink]:
    """The sinks of `metrics.sinks`; none on processes other than the first."""
    if not is_first():
        return []
    return [SINKS[kind](told) for kind in dict.fromkeys(kinds)]


def check_sinks(kinds: Sequence[Sink], *, keeps_files: bool) -> None:
    """Raises SinkError where W&B is asked for and its package or a login is missing; asks nobody.

    `keeps_files` says that the run folder is a folder of this machine.
    """
    if Sink.wandb not in kinds or not is_first():
        return
    where = f"metrics.sinks={spelled(list(kinds))}"
    try:
        from sdx.training.wandb_sink import is_offline, login_fault
    except ImportError as error:
        raise SinkError(
            f"{where}: the package of W&B cannot be imported ({error}); pip install 'sdx[wandb]', "
            "or leave wandb out."
        ) from error
    if not is_offline():
        if (fault := login_fault()) is not None:
            raise SinkError(
                f"{where}: {fault}; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
                " to keep the rows in the run folder for `wandb sync`."
            )
    elif not keeps_files:
        raise SinkError(
            f"{where}: offline, W&B keeps what it is told in the run folder, which is in an object "
            "store; use WANDB_MODE=online, a local run.output_dir, or leave wandb out."
        )
