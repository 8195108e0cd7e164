"""Checkpoints that are either whole and proven, or do not exist.

Orbax writes the arrays asynchronously; it restores flipped bits without a word and accepts renamed
or half-deleted steps, so this file adds the proof. A step is built in a folder of its own: Orbax's
`state/`, then `manifest.json` with the sha256 of every file in it; then it becomes `<step>/` as a
whole (`step_place`). Restoring verifies the digests first, goes back one step when they do not
hold, and moves the damaged folder aside as `<step>.damaged`.

Arrays are stored as nested dicts named by their path in the state, so that no class of ours or of
optax is part of the format.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sdx.record.store import AnyPath
from sdx.training.step_folder import (
    MANIFEST,
    ArrayKind,
    Damaged,
    check_digests,
    prove_files,
    read_manifest,
    step_folders,
    steps,
    write_manifest,
)
from sdx.training.step_place import fetched, step_place

State = TypeVar("State")  # a pytree of arrays with a leaf called `step`
Found = TypeVar("Found")
Say = Callable[[str], None]
Pick = Callable[[Sequence[int]], Sequence[int]]

_ARRAYS = "state"
_MAX_NAMED = 8  # arrays in one message
_MAX_TEXT_BYTES = 4096  # of one message between hosts


class NoValidCheckpoint(RuntimeError):
    """There are checkpoints and all are damaged: going on would silently start from scratch."""


class CheckpointMismatch(ValueError):
    """A whole checkpoint of something else: arrays, shapes or types differ from what is wanted."""


class Checkpointer:
    """Saves and restores the state of one run in `folder` (`RUN/checkpoints`).

    One process owns the folder, or one set of JAX processes that all make the same calls; `say`
    gets one line for people when something is wrong with it. The newest `keep` steps stay, and
    those that `best` picks of all that are there; it is called in another thread.
    """

    def __init__(
        self, folder: AnyPath, *, keep: int, say: Say, best: Pick = lambda steps: []
    ) -> None:
        assert keep >= 2, "checkpoint.keep: the only good step must never be the one to replace"
        self.folder = folder.absolute()
        self._place = step_place(self.folder)
        self._keep = keep
        self._best = best
        self._say = say
        self._orbax = ocp.StandardCheckpointer()
        self._proving: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: Any) -> None:
        """Copies the state to the host and writes it in the background.

        First waits for the save before and raises what went wrong with it. A step that is already
        there is kept as it is. `state` may be donated as soon as this returns.
        """
        self.wait()
        if _from_first_host("exists" if self._place.has(step) else ""):
            return
        draft = Path(_from_first_host(str(self._place.draft(step)) if _is_first_host() else ""))
        arrays = _named_leaves(state)
        self._orbax.save(draft / _ARRAYS, _nested(arrays))
        kinds = {name: _kind(leaf) for name, leaf in arrays.items()}
        self._proving = threading.Thread(
            target=self._prove, args=(step, draft, kinds), name="sdx-checkpoint"
        )
        self._proving.start()

    def wait(self) -> None:
        """Returns when the last save is proven and in place; raises what went wrong with it."""
        if self._proving is not None:
            self._proving.join()
            self._proving = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, then frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """Steps with a manifest of their own number, ascending; their digests are not checked."""
        return steps(self.folder)

    def restore(self, abstract_state: State) -> tuple[int, State] | None:
        """The newest whole checkpoint in the shardings of `abstract_state`; None if none was saved.

        Leaves are jax.ShapeDtypeStruct with a sharding; any mesh will do, not only the one that
        saved. Torn saves are removed, damaged steps moved to `<step>.damaged` and reported.

        Raises:
            NoValidCheckpoint: some step was saved and none is whole.
            CheckpointMismatch: the newest whole one holds other arrays.
        """
        if _is_first_host():
            self._place.clean_up()
        found = _newest_whole(
            _agreed_step_folders(self.folder),
            lambda path, step: _restore_verified(path, step, abstract_state),
            self._say,
            on_damage=self._set_aside,
        )
        damaged = "yes" if any(self.folder.glob("*.damaged*")) else ""
        if found is None and _from_first_host(damaged):
            raise NoValidCheckpoint(
                f"{self.folder}: no valid checkpoint left; the damaged ones are kept there. "
                "To start from step 0, use another run.name or remove the run folder."
            )
        return found

    def _prove(self, step: int, draft: Path, arrays: dict[str, ArrayKind]) -> None:
        try:
            self._orbax.wait_until_finished()
            if _is_first_host():
                write_manifest(draft / MANIFEST, step, prove_files(draft), arrays)
                self._place.publish(step)
                self._remove_old()
        except BaseException as error:
            self._error = error  # raised by the next save or wait
        finally:
            self._place.discard(step)  # a full disk needs the space

    def _remove_old(self) -> None:
        there = self.steps()
        for step in sorted({*there[: -self._keep]} - {*self._best(there)}):
            self._place.remove(step)

    def _set_aside(self, step: int) -> None:
        if _is_first_host():
            self._place.set_aside(step)
        _barrier("sdx-set-aside")


def restore_step(
    folder: AnyPath, step: int | None, abstract_state: State, *, say: Say
) -> tuple[int, State]:
    """That step, or for None the newest whole one, of a run not ours; changes nothing there.

    Raises NoValidCheckpoint when it is missing or damaged, CheckpointMismatch as `restore` does.
    """
    return _read_only(
        folder, step, lambda path, number: _restore_verified(path, number, abstract_state), say
    )


def restore_params(
    folder: AnyPath, which: Literal["ema", "params"], *, step: int | None = None, say: Say
) -> tuple[int, dict[str, Any]]:
    """The weights alone as nested dicts of numpy arrays, from `step` or the newest whole one.

    Nothing else of the state is read into memory, though all of it is verified; changes nothing.
    Raises as `restore_step` does, also when the run kept no average.
    """
    return _read_only(
        folder, step, lambda path, number: _restore_verified_params(path, number, which), say
    )


def _read_only(
    folder: AnyPath, step: int | None, read: Callable[[AnyPath, int], Found], say: Say
) -> tuple[int, Found]:
    folder = folder.absolute()
    wanted = [(n, path) for n, path in _agreed_step_folders(folder) if step is None or n == step]
    found = _newest_whole(wanted, read, say, on_damage=lambda step: None)
    if found is None:
        what = "valid checkpoint" if step is None else f"valid checkpoint {step}"
        there = ", ".join(map(str, steps(folder))) or "none"
        raise NoValidCheckpoint(f"{folder}: no {what}; steps there: {there}.")
    return found


def _newest_whole(
    folders: Sequence[tuple[int, AnyPath]],
    read: Callable[[AnyPath, int], Found],
    say: Say,
    on_damage: Callable[[int], None],
) -> tuple[int, Found] | None:
    """What `read` makes of the last step not damaged; says one line on each that is."""
    complaint = None
    for step, path in reversed(folders):
        try:
            found = read(path, step)
        except Damaged as damage:
            if complaint is not None:
                say(complaint)
            complaint = f"checkpoint {step} is damaged: {damage}"
            on_damage(step)
            continue
        if complaint is not None:
            say(f"{complaint}; continuing from {step}")
        return step, found
    if complaint is not None:
        say(complaint)
    return None


def _restore_verified(path: AnyPath, step: int, abstract_state: State) -> State:
    wanted = _named_leaves(abstract_state)
    with _verified(path, step) as (folder, arrays):
        _check_same_arrays(path, arrays, wanted)
        restored = _read_arrays(folder, wanted)
    if int(restored["step"]) != step:
        raise Damaged(f"its state is of step {int(restored['step'])}")
    structure = jax.tree.structure(abstract_state)
    return jax.tree.unflatten(structure, [restored[name] for name in wanted])


def _restore_verified_params(path: AnyPath, step: int, which: str) -> dict[str, Any]:
    with _verified(path, step) as (folder, arrays):
        wanted = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in arrays.items()
            if name.startswith(f"{which}/")
        }
        if not wanted:
            raise CheckpointMismatch(
                f"{path}: holds no {which}; it was saved with train.ema=false."
            )
        return _nested(_read_arrays(folder, wanted))[which]


def _read_arrays(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of those names. An error here is no damage: the digests held."""
    item = _nested(wanted)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.restore(
            path / _ARRAYS,
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )
    return _named_leaves(tree)


@contextmanager
def _verified(path: AnyPath, step: int) -> Iterator[tuple[Path, dict[str, ArrayKind]]]:
    """A local folder with the step's files, and the arrays they hold; raises Damaged, on every host
    alike, if a digest fails."""
    _agree(lambda: read_manifest(path, step))
    manifest = read_manifest(path, step)
    with fetched(path, manifest["files"]) as folder:
        _agree(lambda: check_digests(folder, manifest["files"]))
        yield folder, manifest["arrays"]


def _agree(check: Callable[[], object]) -> None:
    """Runs `check` on process 0 and raises its Damaged on all."""
    complaint = ""
    if _is_first_host():
        try:
            check()
        except Damaged as damage:
            complaint = str(damage)
    complaint = _from_first_host(complaint)
    if complaint:
        raise Damaged(complaint)


def _check_same_arrays(
    path: AnyPath, stored: Mapping[str, ArrayKind], wanted: Mapping[str, Any]
) -> None:
    here = {name: _kind(leaf) for name, leaf in wanted.items()}
    faults = [
        f"{name} is {_show(stored.get(name))} there, {_show(here.get(name))} here"
        for name in sorted({*stored, *here})
        if stored.get(name) != here.get(name)
    ]
    if faults:
        shown = "; ".join(faults[:_MAX_NAMED]) + ("; …" if len(faults) > _MAX_NAMED else "")
        raise CheckpointMismatch(f"{path}: {len(faults)} arrays do not fit: {shown}")


def _kind(leaf: Any) -> ArrayKind:
    return [list(leaf.shape), str(leaf.dtype)]


def _show(kind: ArrayKind | None) -> str:
    return "missing" if kind is None else f"{kind[1]} {tuple(kind[0])}"


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: `opt_state/0/mu/unet/conv_in/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {"/".join(_key_name(key) for key in path): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have one name"
    return named


def _key_name(key: Any) -> str:
    match key:
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key.key)


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _agreed_step_folders(folder: AnyPath) -> list[tuple[int, AnyPath]]:
    """As process 0 lists them: on a shared file system another host may not see all of them yet."""
    names = _from_first_host(" ".join(path.name for _, path in step_folders(folder)))
    return [(int(name), folder / name) for name in names.split()]


def _is_first_host() -> bool:
    return jax.process_index() == 0


def _from_first_host(text: str) -> str:
    """The text that process 0 has, on every host."""
    if jax.process_count() == 1:
        return text
    buffer = np.zeros(_MAX_TEXT_BYTES, np.uint8)
    encoded = text.encode()[:_MAX_TEXT_BYTES]
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(buffer))
    return received.tobytes().rstrip(b"\0").decode(errors="replace")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
