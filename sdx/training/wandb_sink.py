"""Rows and pictures at Weights & Biases, with W&B's own client, whose files lie in `RUN/wandb`.

One run of sdx is one run there, whatever the number of its starts. W&B never changes a step it was
told: steps that are trained again after a rollback are not told again, so that what was told first
stays. A row is told to the service when the next one is written, since pictures of its step may
come in between. Trouble with the network or the service is said and never ends a run.
"""

import hashlib
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from jaxtyping import UInt8

from sdx.config.schema import WandbConfig
from sdx.record.files import write_text
from sdx.record.redact import said_by

INIT_TIMEOUT_S = 60
FINISH_TIMEOUT_S = 30  # what SLURM leaves between SIGTERM and SIGKILL unless told otherwise
FLUSHED_AFTER_S = 15.0  # the service writes its file every few seconds; a kill loses the rest
_NAME_BYTES = 48  # ids may have 64 characters

# No console, code, git state, arguments or packages: sdx records those, without secrets.
_SETTINGS: Mapping[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "init_timeout": INIT_TIMEOUT_S,
    "finish_timeout": FINISH_TIMEOUT_S,
    "finish_timeout_raises": True,
    "silent": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}


def is_offline() -> bool:
    """Whether `WANDB_MODE` or W&B's own settings keep the client from the network."""
    return wandb.setup().settings.mode not in ("online", "run", "shared")


def login_fault() -> str | None:
    """What is wrong with the credentials where W&B looks for them; they are not tried."""
    try:
        return None if wandb.login(prompt=False, verify=False) else "W&B finds no login"
    except wandb.Error as error:
        return said_by(error)


def run_id(name: str, created: str) -> str:
    """The id at W&B of the run in the folder `name` that began at `created`, on whatever machine
    and wherever the folder was moved."""
    digest = hashlib.sha256(f"{name} {created}".encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:_NAME_BYTES]}-{digest}"


class WandbSink:
    """Tells a run of W&B; `folder` is the run's, None where that is in an object store."""

    def __init__(
        self,
        wandb_config: WandbConfig,
        *,
        folder: Path | None,
        name: str,
        created: str,
        config: Mapping[str, Any],
        tags: Sequence[str],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._say = say
        self._clock = clock
        self._temporary = None if folder else tempfile.mkdtemp(prefix="sdx-wandb-")
        self._told = None if folder is None else _Told(folder / "wandb" / "told")
        self._written: deque[tuple[float, int]] = deque()
        self._run = self._open(
            project=wandb_config.project,
            entity=wandb_config.entity,
            id=run_id(name, created),
            resume="allow",
            name=name,
            dir=str(folder or self._temporary),
            config=dict(config),
            tags=list(tags) or None,
            settings=wandb.Settings(**_known(_SETTINGS)),
        )
        self._last_told = max(
            0 if self._told is None else self._told.step,
            0 if self._run is None else self._run.step - 1,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._last_told:
            self._try(lambda run: run.log(dict(values), step=step))
            self._note(step)

    def picture(self, step: int, tag: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        if step > self._last_told:
            self._try(lambda run: run.log({tag: wandb.Image(image, file_type="png")}, step=step))

    def close(self, exit_code: int = 0) -> None:
        """`finished` at W&B with exit code 0, else `failed`; waits for what is on its way."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        if self._run is not None and self._told is not None and self._written:
            self._told.set(self._written[-1][1])
        self._run = None
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _open(self, **options: Any) -> Any:
        Path(options["dir"]).mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(**options)
        except Exception as error:
            kept = "" if self._temporary else "; `wandb sync` sends what is kept in RUN/wandb"
            self._say(f"W&B does not answer ({said_by(error)}), this start tells it nothing{kept}")
            _end_service()
            return None if self._temporary else wandb.init(**options, mode="offline")
        if run.url:
            self._say(f"W&B: {run.url}")
        return run

    def _try(self, act: Callable[[Any], None]) -> None:
        """Whatever goes wrong there is no reason to end a run here."""
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._run = None
            self._say(
                f"W&B is told nothing more ({said_by(error)}); `wandb sync` sends what is kept in "
                "RUN/wandb"
            )
            _end_service()

    def _note(self, step: int) -> None:
        """Keeps for the next start what has reached the disk for certain."""
        now = self._clock()
        done = None
        while self._written and self._written[0][0] <= now - FLUSHED_AFTER_S:
            done = self._written.popleft()[1]
        if self._told is not None and done is not None and self._run is not None:
            self._told.set(done)
        self._written.append((now, step))


class _Told:
    """The last step that W&B has been told, in a file."""

    def __init__(self, path: Path):
        self._path = path
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        self.step = int(text) if text.isdecimal() else 0

    def set(self, step: int) -> None:
        if step > self.step:
            self.step = step
            write_text(self._path, f"{step}\n")


def _end_service() -> None:
    """The client's own process, which otherwise keeps the run or complains at exit."""
    with suppress(Exception, SystemExit):  # whatever went wrong there has been said
        wandb.teardown()


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what another version of W&B does not have."""
    return {name: value for name, value in settings.items() if name in wandb.Settings.model_fields}
