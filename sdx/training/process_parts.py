"""Steps that many processes write without a folder they share: each its part, joined when read.

Orbax lets every process write a database of its own below the step, `ocdbt.process_<i>`, and the
first one joins them by an index of all, for which it must see them. Where they lie on the disks of
many hosts, on their way to an object store, the step is kept without that index; who reads it has
all parts in one place and makes it there, which copies no array.
"""

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from sdx.parallel.agreement import is_first, mark, process_count, process_index, take_marks
from sdx.record.scratch import scratch_folder
from sdx.record.store import StoreError
from sdx.training.step_folder import FileProof, prove_files
from sdx.training.step_place import StepPlace

ARRAYS = "state"
"""The folder of Orbax's files in that of a step."""
_PARTS = "ocdbt.process_"
_INDEX, _INDEX_DATA = "manifest.ocdbt", "d"
_LOOK_EVERY_S = 0.1  # whether the others have uploaded their parts


def writer(*, is_shared: bool) -> ocp.AsyncCheckpointer:
    """Orbax's, for folders that all processes see, or for one of each process's own."""
    if is_shared or process_count() == 1:
        return ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=among(everyone())),
            multiprocessing_options=among(everyone()),
        )
    logging.getLogger("absl").addFilter(_is_of_interest)
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None,
        active_processes={process_index()},
        barrier_sync_key_prefix=f"sdx-alone-{process_index()}",
    )
    # Handlers of its own: those that Orbax gives to all have one store of metadata, which waits for
    # the folder of the process that came first in whoever was made last, a reader for instance.
    arrays = ocp.type_handlers.ArrayHandler()
    handler = ocp.BasePyTreeCheckpointHandler(
        multiprocessing_options=alone,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        enable_post_merge_validation=False,  # it misses the other processes' parts
    )
    return ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(handler_impl=handler, multiprocessing_options=alone),
        multiprocessing_options=alone,
        # Else each tells itself that its folder is there under a name that is the same in all, and
        # the first to have saved removes it while others wait for it.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )


def proofs_of_all(place: StepPlace, step: int, draft: Path, save: int) -> dict[str, FileProof]:
    """Of every file of a step that Orbax has written, once they are where they belong; of many
    processes in the first. `save` is this save's number in all of them. StoreError in the first
    where another one's part could not be brought; in that one the error itself."""
    if place.is_shared:
        return prove_files(draft) if is_first() else {}
    event = f"saved/{save}"
    try:
        _keep_own_part(draft)
        files = prove_files(draft)
        place.bring(step)
    except Exception as error:
        mark(event, f"{type(error).__name__}: {error}")
        raise
    if process_count() == 1:
        return files
    mark(event, files)
    proofs = take_marks(event) if is_first() else []
    while proofs is None:
        time.sleep(_LOOK_EVERY_S)
        proofs = take_marks(event)
    if reasons := [told for told in proofs if isinstance(told, str)]:
        raise StoreError(f"a part of checkpoint {step} could not be saved: {reasons[0]}")
    return {name: proof for files in proofs for name, proof in files.items()}


def everyone() -> set[int]:
    return set(range(process_count()))


def among(processes: set[int]) -> ocp.options.MultiprocessingOptions:
    """These read or write together. Named, they meet at barriers of the coordination service;
    Orbax's default are collectives of the devices, which must not fall between those of a step."""
    return ocp.options.MultiprocessingOptions(
        primary_host=min(processes),
        active_processes=processes,
        barrier_sync_key_prefix=f"sdx-{len(processes)}",  # a barrier has always the same members
    )


def _keep_own_part(step: Path) -> None:
    """Leaves in a step that this process has written alone what the others do not have too."""
    if process_count() == 1:
        return
    for path in (step / ARRAYS).iterdir():
        is_own = path.name.startswith(_PARTS)
        if is_own or (is_first() and path.name not in (_INDEX, _INDEX_DATA)):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def joined(step: Path) -> Iterator[Path]:
    """A folder with the step as a whole, whose parts stay where they are; `step` itself where it
    is one."""
    arrays = step / ARRAYS
    parts = sorted(arrays.glob(f"{_PARTS}*"))
    if not parts or (arrays / _INDEX).exists():
        yield step
        return
    with scratch_folder() as whole:
        (whole / ARRAYS).mkdir()
        for path in arrays.iterdir():
            (whole / ARRAYS / path.name).symlink_to(path.absolute())
        _write_index(whole / ARRAYS, [path.name for path in parts])
        yield whole


def _write_index(folder: Path, parts: list[str]) -> None:
    import tensorstore  # which Orbax has imported already

    context = tensorstore.Context()  # one for all: else arrays would be copied, not referred to

    def database(path: Path) -> tensorstore.KvStore:
        base = {"driver": "file", "path": f"{path}/"}
        return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()

    index = database(folder)
    for name in parts:
        database(folder / name).experimental_copy_range_to(index).result()


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Not that Orbax cannot add up the sizes of all parts, at every save."""
    return "Global object size logging" not in str(record.msg)
