"""A cache of an object store on this machine's disk, where ArrayRecord can read it.

Every file is verified by its digest on the way, and has its name only when it is whole. Processes
of one machine take turns, so that one copies and the others find everything there.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sdx.config.schema import DataConfig
from sdx.data.cache.records import read_index, records_name, size_text
from sdx.data.source import DataError
from sdx.record.files import write_text
from sdx.record.store import AnyPath, patiently

STAGED = Path(str(DataConfig.cache_dir)).expanduser()
"""Where copies lie, by the names of the caches: where a local cache would be."""
_CHUNK_BYTES = 64 << 20


def local_cache(folder: AnyPath, *, say: Callable[[str], None] = print) -> Path:
    """The folder itself, or a copy of it on this machine; DataError where that cannot be made."""
    if isinstance(folder, Path):
        return folder
    copy = STAGED / folder.name
    copy.mkdir(parents=True, exist_ok=True)
    with open(copy / ".copying", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the kernel drops it with the process
        _copy(folder, copy, say)
    return copy


def _copy(folder: AnyPath, copy: Path, say: Callable[[str], None]) -> None:
    index = read_index(folder)
    if index is None:
        raise DataError(f"{folder}: holds no finished cache; run python -m sdx.encode again.")
    missing = {
        number: shard
        for number, shard in enumerate(index.shards)
        if not _has_size(copy / records_name(number), shard.num_bytes)
    }
    if not missing and read_index(copy) == index:
        return
    num_bytes = sum(shard.num_bytes for shard in missing.values())
    if (free := shutil.disk_usage(copy).free) < num_bytes:
        raise DataError(
            f"{folder}: its {size_text(num_bytes)} are copied to {copy} to be read, where"
            f" {size_text(free)} are free; make room, or encode into a local folder"
            " (data.cache_dir)."
        )
    say(f"copying {len(missing)} files, {size_text(num_bytes)}, from {folder} to {copy}")
    for number, shard in missing.items():
        _fetch(folder / records_name(number), copy / records_name(number), shard.sha256)
    for name in ("meta.json", "index.json"):  # the index last: it says that all is there
        write_text(copy / name, (folder / name).read_text())


def _fetch(source: AnyPath, file: Path, sha256: str) -> None:
    draft = file.with_name(f".{file.name}.tmp")
    digest = hashlib.sha256()
    with open(draft, "wb") as out:
        start = 0
        while chunk := patiently(lambda at=start: _part(source, at)):
            out.write(chunk)
            digest.update(chunk)
            start += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != sha256:
        draft.unlink()
        raise DataError(
            f"{source}: damaged, its digest is not that of the index; remove it and run"
            " python -m sdx.encode with the same overrides, which makes it anew."
        )
    os.replace(draft, file)


def _part(source: AnyPath, start: int) -> bytes:
    """The next bytes; none at the end."""
    assert not isinstance(source, Path)
    end = min(start + _CHUNK_BYTES, source.size())
    return source.read_bytes(start, end) if start < end else b""


def _has_size(file: Path, num_bytes: int) -> bool:
    return file.is_file() and file.stat().st_size == num_bytes
