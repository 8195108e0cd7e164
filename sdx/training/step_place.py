"""Where the steps of a run lie, and what it takes that one is there whole or not at all.

In a file system a step is built beside its place, and one rename puts it there. A store has no
rename: a step is built in a local scratch folder and uploaded, its manifest last; it goes manifest
first. (Orbax can write to s3:// itself, but hands TensorStore no endpoint, so Amazon's alone.)
"""

import itertools
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from sdx.record.behind import flush
from sdx.record.scratch import scratch_folder
from sdx.record.store import (
    AnyPath,
    ObjectPath,
    move_tree,
    patiently,
    put_last,
    remove_tree,
    upload,
)
from sdx.training.step_folder import MANIFEST, Damaged, FileProof

AnyFolder = TypeVar("AnyFolder", Path, ObjectPath)

_SAVING = ".saving-"


@runtime_checkable
class StepPlace(Protocol):
    """What a Checkpointer needs of the folder of steps; steps are built one at a time."""

    @property
    def is_shared(self) -> bool:
        """Whether all processes of a run build in the first one's draft, each in its own
        otherwise."""
        ...

    def make_room(self, step: int) -> bool:
        """Removes what was left in the step's place; False where it is there, which stays."""
        ...

    def draft(self, step: int) -> Path:
        """A local folder to build the step in."""
        ...

    def bring(self, step: int) -> None:
        """Puts what is in the draft where it belongs; before all of it is there, it is no step."""
        ...

    def publish(self, step: int) -> None:
        """Makes what was brought the step, once the draft has its manifest; returns when it is
        there."""
        ...

    def discard(self, step: int) -> None:
        """Frees what the draft took, if there still is one."""
        ...

    def remove(self, step: int) -> None: ...

    def set_aside(self, step: int) -> None:
        """Moves a damaged step to `<step>.damaged`, or `.damaged.2` where that is taken."""
        ...

    def clean_up(self) -> None:
        """Removes what a kill left of saving and removing."""
        ...


def step_place(folder: AnyPath) -> StepPlace:
    """Of whatever kind the folder is."""
    return ObjectPlace(folder) if isinstance(folder, ObjectPath) else LocalPlace(folder)


class LocalPlace:
    """A folder in a file system."""

    is_shared = True

    def __init__(self, folder: Path):
        self._folder = folder

    def make_room(self, step: int) -> bool:
        return not (self._folder / str(step)).exists()

    def draft(self, step: int) -> Path:
        self.discard(step)
        saving = self._saving(step)
        saving.mkdir(parents=True)
        return saving

    def bring(self, step: int) -> None:
        """It is built beside its place."""

    def publish(self, step: int) -> None:
        os.rename(self._saving(step), self._folder / str(step))

    def discard(self, step: int) -> None:
        shutil.rmtree(self._saving(step), ignore_errors=True)

    def remove(self, step: int) -> None:
        doomed = self._folder / f"{_SAVING}{step}.old"
        os.rename(self._folder / str(step), doomed)  # a kill must not leave half of a step
        shutil.rmtree(doomed)

    def set_aside(self, step: int) -> None:
        path = self._folder / str(step)
        os.rename(path, _aside(path))

    def clean_up(self) -> None:
        for torn in self._folder.glob(f"{_SAVING}*"):
            shutil.rmtree(torn)

    def _saving(self, step: int) -> Path:
        return self._folder / f"{_SAVING}{step}"


class ObjectPlace:
    """A folder in an object store. Of many processes each brings its own part of a step, the first
    one does all else."""

    is_shared = False

    def __init__(self, folder: ObjectPath):
        self._folder = folder
        self._draft: Path | None = None
        self._scratch = ExitStack()

    def make_room(self, step: int) -> bool:
        if (self._folder / str(step) / MANIFEST).exists():
            return False
        remove_tree(self._folder / str(step))
        return True

    def draft(self, step: int) -> Path:
        self._draft = self._scratch.enter_context(scratch_folder())
        return self._draft

    def bring(self, step: int) -> None:
        assert self._draft is not None
        upload(self._draft, self._folder / str(step))

    def publish(self, step: int) -> None:
        assert self._draft is not None
        manifest = (self._draft / MANIFEST).read_bytes()
        files: dict[str, FileProof] = json.loads(manifest)["files"]
        flush()  # who goes on from this step finds every row up to it
        put_last(
            self._folder / str(step) / MANIFEST,
            manifest,
            after={name: num_bytes for name, (_, num_bytes) in files.items()},
        )

    def discard(self, step: int) -> None:
        self._scratch.close()

    def remove(self, step: int) -> None:
        path = self._folder / str(step)
        patiently(lambda: (path / MANIFEST).unlink(missing_ok=True))
        remove_tree(path)

    def set_aside(self, step: int) -> None:
        path = self._folder / str(step)
        move_tree(path, _aside(path), first=MANIFEST)

    def clean_up(self) -> None:
        for path in self._folder.iterdir():
            if path.name.isdigit() and not (path / MANIFEST).exists():
                remove_tree(path)


def check_sizes(path: AnyPath, files: dict[str, FileProof]) -> None:
    """Raises Damaged where files of a step in a store are not as long as proven, which costs no
    download."""
    if isinstance(path, Path):
        return
    there = path.files()
    for name, (_, num_bytes) in files.items():
        if name not in there:
            raise Damaged(f"{name} is missing")
        if there[name] != num_bytes:
            raise Damaged(f"{name} has {there[name]} of its {num_bytes} bytes")


def _aside(path: AnyFolder) -> AnyFolder:
    aside = path.with_name(f"{path.name}.damaged")
    for number in itertools.count(2):
        if not aside.exists():
            break
        aside = path.with_name(f"{path.name}.damaged.{number}")
    return aside
