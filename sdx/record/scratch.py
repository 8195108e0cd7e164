"""Local folders for what passes through, on its way to a store or from one.

They lie where TMPDIR says. A lock that the kernel drops with its process tells those of living
processes from those a kill left behind, across containers too; the latter go with the next use.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "sdx-scratch-"
_LOCK = "lock"
_YOUNG_S = 5.0  # more than lies between the making of a folder and the taking of its lock


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, removed afterwards."""
    _remove_dead(Path(tempfile.gettempdir()))
    whole = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(whole / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = whole / "files"
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(whole, ignore_errors=True)
        os.close(lock)


def _remove_dead(above: Path) -> None:
    for whole in above.glob(f"{_PREFIX}*"):
        try:
            if time.time() - whole.stat().st_mtime > _YOUNG_S and not _is_used(whole / _LOCK):
                shutil.rmtree(whole, ignore_errors=True)
        except OSError:  # another user's, or gone meanwhile
            continue


def _is_used(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:  # killed before it was made, or while all was removed
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
