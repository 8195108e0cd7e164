"""Checkpoints that are either whole and proven, or do not exist.

Orbax writes the arrays asynchronously; it restores flipped bits without a word and accepts renamed
or half-deleted steps, so this file adds the proof. A step is built in a folder of its own: Orbax's
`state/`, then `manifest.json` with the sha256 of every file in it; then it becomes `<step>/` as a
whole (`step_place`). Restoring verifies the digests first, goes back one step when they do not
hold, and moves the damaged folder aside as `<step>.damaged`.

Arrays are stored as nested dicts named by their path in the state, so that no class of ours or of
optax is part of the format.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from sdx.parallel.agreement import (
    ALONE,
    TOGETHER,
    Readers,
    from_first,
    gather,
    is_first,
    process_index,
)
from sdx.record.store import AnyPath, ObjectPath, local_copy
from sdx.training.process_parts import ARRAYS, among, everyone, joined, proofs_of_all, writer
from sdx.training.replicas import num_replicas, on_first_replica, readers, send_to_all
from sdx.training.step_folder import (
    MANIFEST,
    ArrayKind,
    Damaged,
    check_digests,
    read_manifest,
    step_folders,
    steps,
    write_manifest,
)
from sdx.training.step_place import check_sizes, step_place

State = TypeVar("State")  # a pytree of arrays with a leaf called `step`
Found = TypeVar("Found")
Say = Callable[[str], None]
Pick = Callable[[Sequence[int]], Sequence[int]]

_MAX_NAMED = 8  # arrays in one message
_saves = itertools.count()
"""Numbers of saves, the same in all processes."""


class NoValidCheckpoint(RuntimeError):
    """There are checkpoints and all are damaged: going on would silently start from scratch."""


class CheckpointMismatch(ValueError):
    """A whole checkpoint of something else: arrays, shapes or types differ from what is wanted."""


class Checkpointer:
    """Saves and restores the state of one run in `folder` (`RUN/checkpoints`).

    One process owns the folder, or one set of JAX processes that all make the same calls: each
    writes the arrays it has, the first one proves, publishes and removes; to a store each proves
    and uploads its own part (`process_parts`). `say` gets one line for people when something is
    wrong with it. The newest `keep` steps stay, and those that `best` picks of all that are there;
    it is called in another thread of the first process. With `reads_once`, restoring reads one copy
    of the model and sends it to the others (`replicas`).
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        keep: int,
        say: Say,
        best: Pick = lambda steps: [],
        reads_once: Mesh | None = None,
    ) -> None:
        assert keep >= 2, "checkpoint.keep: the only good step must never be the one to replace"
        self.folder = folder.absolute()
        self._place = step_place(self.folder)
        self._keep = keep
        self._best = best
        self._say = say
        self._reads_once = reads_once
        self._orbax = writer(is_shared=self._place.is_shared)
        self._proving: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: Any) -> None:
        """Copies the state to the host and writes it in the background.

        First waits for the save before and raises what went wrong with it. A step that is already
        there is kept as it is. `state` may be donated as soon as this returns.
        """
        self.wait()
        if not from_first(lambda: self._place.make_room(step)):
            return
        if self._place.is_shared:
            draft = Path(from_first(lambda: str(self._place.draft(step))))
        else:
            draft = self._place.draft(step)
        arrays = _named_leaves(state)
        self._orbax.save(draft / ARRAYS, args=ocp.args.PyTreeSave(_nested(arrays)))
        kinds = {name: _kind(leaf) for name, leaf in arrays.items()}
        self._proving = threading.Thread(
            target=self._prove, args=(step, draft, kinds, next(_saves)), name="sdx-checkpoint"
        )
        self._proving.start()

    def wait(self) -> None:
        """Returns when the last save is proven and in place; raises what went wrong with it."""
        self._join()
        gather(None)  # no process leaves while the first one still proves

    def close(self) -> None:
        """Waits for this process's part, then frees Orbax's threads."""
        try:
            self._join()
        finally:
            self._orbax.close()

    def _join(self) -> None:
        if self._proving is not None:
            self._proving.join()
            self._proving = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

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
        if is_first():
            self._place.clean_up()
        found = _newest_whole(
            _listed(self.folder, TOGETHER),
            lambda path, step: _restore_verified(path, step, abstract_state, self._reads_once),
            self._say,
            on_damage=self._set_aside,
        )
        if found is None and from_first(lambda: any(self.folder.glob("*.damaged*"))):
            raise NoValidCheckpoint(
                f"{self.folder}: no valid checkpoint left; the damaged ones are kept there. "
                "To start from step 0, use another run.name or remove the run folder."
            )
        return found

    def _prove(self, step: int, draft: Path, arrays: dict[str, ArrayKind], save: int) -> None:
        try:
            self._orbax.wait_until_finished()
            files = proofs_of_all(self._place, step, draft, save)
            if is_first():
                write_manifest(draft / MANIFEST, step, files, arrays)
                self._place.publish(step)
                self._remove_old()
        except BaseException as error:
            self._error = error  # raised by the next save or wait
        finally:
            if is_first() or not self._place.is_shared:  # else the first one could not publish
                self._place.discard(step)  # a full disk needs the space

    def _remove_old(self) -> None:
        there = self.steps()
        for step in sorted({*there[: -self._keep]} - {*self._best(there)}):
            self._place.remove(step)

    def _set_aside(self, step: int) -> None:
        if is_first():
            self._place.set_aside(step)
        gather(None)


def restore_step(
    folder: AnyPath, step: int | None, abstract_state: State, *, say: Say
) -> tuple[int, State]:
    """That step, or for None the newest whole one, of a run not ours, in all processes; changes
    nothing there.

    Raises NoValidCheckpoint when it is missing or damaged, CheckpointMismatch as `restore` does.
    """
    return _read_only(
        folder,
        step,
        lambda path, number: _restore_verified(path, number, abstract_state),
        say,
        TOGETHER,
    )


def restore_params(
    folder: AnyPath, which: Literal["ema", "params"], *, step: int | None = None, say: Say
) -> tuple[int, dict[str, Any]]:
    """The weights alone as nested dicts of numpy arrays, from `step` or the newest whole one; of
    many processes it asks none but the calling one.

    Nothing else of the state is read into memory, though all of it is verified; changes nothing.
    Raises as `restore_step` does, also when the run kept no average.
    """
    return _read_only(
        folder,
        step,
        lambda path, number: _restore_verified_params(path, number, which),
        say,
        ALONE,
    )


def _read_only(
    folder: AnyPath,
    step: int | None,
    read: Callable[[AnyPath, int], Found],
    say: Say,
    by: Readers,
) -> tuple[int, Found]:
    folder = folder.absolute()
    wanted = [(n, path) for n, path in _listed(folder, by) if step is None or n == step]
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


def _restore_verified(
    path: AnyPath, step: int, abstract_state: State, reads_once: Mesh | None = None
) -> State:
    wanted = _named_leaves(abstract_state)
    with _verified(path, step, TOGETHER) as (folder, arrays):
        _check_same_arrays(path, arrays, wanted)
        if reads_once is None or num_replicas(reads_once) == 1:
            restored = _read_arrays(folder, wanted, everyone())
        else:
            restored = _read_once(folder, wanted, reads_once)
    if int(restored["step"]) != step:
        raise Damaged(f"its state is of step {int(restored['step'])}")
    structure = jax.tree.structure(abstract_state)
    return jax.tree.unflatten(structure, [restored[name] for name in wanted])


def _restore_verified_params(path: AnyPath, step: int, which: str) -> dict[str, Any]:
    with _verified(path, step, ALONE) as (folder, arrays):
        wanted = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
            for name, (shape, dtype) in arrays.items()
            if name.startswith(f"{which}/")
        }
        if not wanted:
            raise CheckpointMismatch(
                f"{path}: holds no {which}; it was saved with train.ema=false."
            )
        return _nested(_read_arrays(folder, wanted, {process_index()}))[which]


def _read_once(path: Path, wanted: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The arrays of those names, read by the processes of one copy of the model alone."""
    read: dict[str, Any] = {}
    if process_index() in readers(mesh):
        read = _read_arrays(path, on_first_replica(wanted, mesh), readers(mesh))
    gather(None)  # the others wait here, not in a collective, which may give up
    return send_to_all(read, wanted, mesh)


def _read_arrays(path: Path, wanted: Mapping[str, Any], processes: set[int]) -> dict[str, Any]:
    """The arrays of those names, in all of `processes`. An error here is no damage: the digests
    held."""
    item, options = _nested(wanted), among(processes)
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as orbax:
        tree = orbax.restore(
            path / ARRAYS,
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )
    return _named_leaves(tree)


@contextmanager
def _verified(path: AnyPath, step: int, by: Readers) -> Iterator[tuple[Path, dict[str, ArrayKind]]]:
    """A local folder with the step's files, and the arrays they hold; raises Damaged, in every
    process alike, if a digest fails."""
    manifest = by.first(lambda: read_manifest(path, step), (Damaged,))
    files = manifest["files"]
    by.first(lambda: check_sizes(path, files), (Damaged,))
    judge = by.each if isinstance(path, ObjectPath) else by.first
    with local_copy(path) as folder:  # of a store each process has its own
        judge(lambda: check_digests(folder, files), (Damaged,))
        with joined(folder) as whole:
            yield whole, manifest["arrays"]


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


def _listed(folder: AnyPath, by: Readers) -> list[tuple[int, AnyPath]]:
    """As process 0 lists them: on a shared file system another host may not see all of them yet."""
    names = by.first(lambda: [path.name for _, path in step_folders(folder)])
    return [(int(name), folder / name) for name in names]
