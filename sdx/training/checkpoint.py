"""Checkpoints that are either whole and proven, or do not exist.

Orbax writes the arrays asynchronously; it restores flipped bits without a word and accepts renamed
or half-deleted steps, so this file adds the proof. A step is built in `.saving-<step>/`: Orbax's
`state/`, then `manifest.json` with the sha256 of every file in it, and one rename makes it
`<step>/`. Restoring verifies the digests first, goes back one step when they do not hold, and moves
the damaged folder aside as `<step>.damaged`.

Arrays are stored as nested dicts named by their path in the state, so that no class of ours or of
optax is part of the format.
"""

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

State = TypeVar("State")  # a pytree of arrays with a leaf called `step`
Found = TypeVar("Found")
Say = Callable[[str], None]
Pick = Callable[[Sequence[int]], Sequence[int]]
FileProof = list[Any]  # [sha256, bytes]: as JSON gives it back
ArrayKind = list[Any]  # [shape, dtype]

_FORMAT = 1
_MANIFEST = "manifest.json"
_ARRAYS = "state"
_SAVING = ".saving-"
_DIGEST_THREADS = 4
_MAX_NAMED = 8  # arrays in one message
_MAX_TEXT_BYTES = 4096  # of one message between hosts


class NoValidCheckpoint(RuntimeError):
    """There are checkpoints and all are damaged: going on would silently start from scratch."""


class CheckpointMismatch(ValueError):
    """A whole checkpoint of something else: arrays, shapes or types differ from what is wanted."""


class _Damaged(Exception):
    """Why a step folder is not the checkpoint it claims to be."""


class Checkpointer:
    """Saves and restores the state of one run in `folder` (`RUN/checkpoints`).

    One process owns the folder, or one set of JAX processes that all make the same calls; `say`
    gets one line for people when something is wrong with it. The newest `keep` steps stay, and
    those that `best` picks of all that are there; it is called in another thread.
    """

    def __init__(self, folder: Path, *, keep: int, say: Say, best: Pick = lambda steps: []) -> None:
        assert keep >= 2, "checkpoint.keep: the only good step must never be the one to replace"
        self.folder = folder.absolute()
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
        final = self.folder / str(step)
        if _from_first_host("exists" if final.exists() else ""):
            return
        saving = self.folder / f"{_SAVING}{step}"
        if jax.process_index() == 0:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir(parents=True)
        _barrier("sdx-save")
        arrays = _named_leaves(state)
        self._orbax.save(saving / _ARRAYS, _nested(arrays))
        kinds = {name: _kind(leaf) for name, leaf in arrays.items()}
        self._proving = threading.Thread(
            target=self._prove, args=(step, saving, final, kinds), name="sdx-checkpoint"
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
        return _steps(self.folder)

    def restore(self, abstract_state: State) -> tuple[int, State] | None:
        """The newest whole checkpoint in the shardings of `abstract_state`; None if none was saved.

        Leaves are jax.ShapeDtypeStruct with a sharding; any mesh will do, not only the one that
        saved. Torn saves are removed, damaged steps moved to `<step>.damaged` and reported.

        Raises:
            NoValidCheckpoint: some step was saved and none is whole.
            CheckpointMismatch: the newest whole one holds other arrays.
        """
        if jax.process_index() == 0:
            for torn in self.folder.glob(f"{_SAVING}*"):
                shutil.rmtree(torn)
        found = _newest_whole(
            _agreed_step_folders(self.folder),
            lambda path, step: _restore_verified(path, step, abstract_state),
            self._say,
            on_damage=_set_aside,
        )
        damaged = "yes" if any(self.folder.glob("*.damaged*")) else ""
        if found is None and _from_first_host(damaged):
            raise NoValidCheckpoint(
                f"{self.folder}: no valid checkpoint left; the damaged ones are kept there. "
                "To start from step 0, use another run.name or remove the run folder."
            )
        return found

    def _prove(self, step: int, saving: Path, final: Path, arrays: dict[str, ArrayKind]) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(saving / _MANIFEST, step, _prove_files(saving), arrays)
                os.rename(saving, final)
                self._remove_old()
        except BaseException as error:
            self._error = error  # raised by the next save or wait
            shutil.rmtree(saving, ignore_errors=True)  # a full disk needs the space

    def _remove_old(self) -> None:
        steps = self.steps()
        for step in sorted({*steps[: -self._keep]} - {*self._best(steps)}):
            doomed = self.folder / f"{_SAVING}{step}.old"
            os.rename(self.folder / str(step), doomed)  # a kill must not leave half of a step
            shutil.rmtree(doomed)


def restore_step(
    folder: Path, step: int | None, abstract_state: State, *, say: Say
) -> tuple[int, State]:
    """That step, or for None the newest whole one, of a run not ours; changes nothing there.

    Raises NoValidCheckpoint when it is missing or damaged, CheckpointMismatch as `restore` does.
    """
    return _read_only(
        folder, step, lambda path, number: _restore_verified(path, number, abstract_state), say
    )


def restore_params(
    folder: Path, which: Literal["ema", "params"], *, step: int | None = None, say: Say
) -> tuple[int, dict[str, Any]]:
    """The weights alone as nested dicts of numpy arrays, from `step` or the newest whole one.

    Nothing else of the state is read into memory, though all of it is verified; changes nothing.
    Raises as `restore_step` does, also when the run kept no average.
    """
    return _read_only(
        folder, step, lambda path, number: _restore_verified_params(path, number, which), say
    )


def _read_only(
    folder: Path, step: int | None, read: Callable[[Path, int], Found], say: Say
) -> tuple[int, Found]:
    folder = folder.absolute()
    steps = [(n, path) for n, path in _agreed_step_folders(folder) if step is None or n == step]
    found = _newest_whole(steps, read, say, on_damage=lambda path: None)
    if found is None:
        wanted = "valid checkpoint" if step is None else f"valid checkpoint {step}"
        there = ", ".join(map(str, _steps(folder))) or "none"
        raise NoValidCheckpoint(f"{folder}: no {wanted}; steps there: {there}.")
    return found


def _newest_whole(
    steps: list[tuple[int, Path]],
    read: Callable[[Path, int], Found],
    say: Say,
    on_damage: Callable[[Path], None],
) -> tuple[int, Found] | None:
    """What `read` makes of the last step not damaged; says one line on each that is."""
    complaint = None
    for step, path in reversed(steps):
        try:
            found = read(path, step)
        except _Damaged as damage:
            if complaint is not None:
                say(complaint)
            complaint = f"checkpoint {step} is damaged: {damage}"
            on_damage(path)
            continue
        if complaint is not None:
            say(f"{complaint}; continuing from {step}")
        return step, found
    if complaint is not None:
        say(complaint)
    return None


def _restore_verified(path: Path, step: int, abstract_state: State) -> State:
    arrays = _verify(path, step)
    wanted = _named_leaves(abstract_state)
    _check_same_arrays(path, arrays, wanted)
    restored = _read_arrays(path, wanted)
    if int(restored["step"]) != step:
        raise _Damaged(f"its state is of step {int(restored['step'])}")
    structure = jax.tree.structure(abstract_state)
    return jax.tree.unflatten(structure, [restored[name] for name in wanted])


def _restore_verified_params(path: Path, step: int, which: str) -> dict[str, Any]:
    arrays = _verify(path, step)
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for name, (shape, dtype) in arrays.items()
        if name.startswith(f"{which}/")
    }
    if not wanted:
        raise CheckpointMismatch(f"{path}: holds no {which}; it was saved with train.ema=false.")
    return _nested(_read_arrays(path, wanted))[which]


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


def _verify(path: Path, step: int) -> dict[str, ArrayKind]:
    """The arrays that the step holds; raises _Damaged, on every host alike, if a digest fails."""
    complaint = ""
    if jax.process_index() == 0:
        try:
            _check_digests(path, _read_manifest(path, step)["files"])
        except _Damaged as damage:
            complaint = str(damage)
    complaint = _from_first_host(complaint)
    if complaint:
        raise _Damaged(complaint)
    return _read_manifest(path, step)["arrays"]


def _check_same_arrays(
    path: Path, stored: Mapping[str, ArrayKind], wanted: Mapping[str, Any]
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


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Folders named by a number, ascending, whatever they hold."""
    if not folder.is_dir():
        return []
    return sorted(
        (int(path.name), path)
        for path in folder.iterdir()
        if path.name.isascii() and path.name.isdigit() and path.is_dir()
    )


def _agreed_step_folders(folder: Path) -> list[tuple[int, Path]]:
    """As process 0 lists them: on a shared file system another host may not see all of them yet."""
    names = _from_first_host(" ".join(path.name for _, path in _step_folders(folder)))
    return [(int(name), folder / name) for name in names.split()]


def _steps(folder: Path) -> list[int]:
    steps = []
    for step, path in _step_folders(folder):
        try:
            _read_manifest(path, step)
        except _Damaged:
            continue
        steps.append(step)
    return steps


def _write_manifest(
    path: Path, step: int, files: dict[str, FileProof], arrays: dict[str, ArrayKind]
) -> None:
    manifest = {"format": _FORMAT, "step": step, "files": files, "arrays": arrays}
    text = json.dumps({**manifest, "sha256": _manifest_digest(manifest)}, indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(path: Path, step: int) -> dict[str, Any]:
    """The manifest of the step folder `path`; raises _Damaged unless it is whole and of `step`."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except FileNotFoundError:
        raise _Damaged("it has no manifest") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Damaged(f"its manifest is unreadable ({error})") from error
    if digest != _manifest_digest(manifest):
        raise _Damaged("its manifest does not match its own digest")
    if manifest["step"] != step or path.name != str(step):
        raise _Damaged(f"its manifest is of step {manifest['step']}")
    return manifest


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _prove_files(folder: Path) -> dict[str, FileProof]:
    """sha256 and size of every file below `folder`, flushed to the disk on the way."""

    def prove(path: Path) -> tuple[str, FileProof]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return path.relative_to(folder).as_posix(), [digest, path.stat().st_size]

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        return dict(pool.map(prove, files))


def _check_digests(folder: Path, files: Mapping[str, FileProof]) -> None:
    def fault(name: str) -> str | None:
        path = folder / name
        digest, num_bytes = files[name]
        try:
            found_bytes = path.stat().st_size
            if found_bytes != num_bytes:
                return f"{name} has {found_bytes} of its {num_bytes} bytes"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} does not match its digest"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is unreadable ({error.strerror})"
        return None

    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        faults = [text for text in pool.map(fault, files) if text is not None]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise _Damaged(faults[0] + more)


def _set_aside(path: Path) -> None:
    """Renames a damaged step folder to `<step>.damaged`, or `.damaged.2` where that is taken."""
    if jax.process_index() == 0:
        aside = path.with_name(f"{path.name}.damaged")
        for number in itertools.count(2):
            if not aside.exists():
                break
            aside = path.with_name(f"{path.name}.damaged.{number}")
        os.rename(path, aside)
    _barrier("sdx-set-aside")


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
