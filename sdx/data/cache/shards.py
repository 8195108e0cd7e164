"""Writing the shards of a cache, so that a kill at any moment leaves whole ones and nothing else.

A shard is written under a name that no other process takes, read again for its digest, and given
its own name; then its description appears beside it. In an object store both appear by one put
each. Two processes that write the same shard write the same content, and the last one wins.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from sdx.data.cache.records import Shard, read_shard, records_name
from sdx.data.source import BadImage
from sdx.record.files import write_json
from sdx.record.store import AnyPath, ObjectPath, upload

# One record a group: each is read alone. Moments are noise to a compressor: 8 % smaller at 5 times
# the time to read.
WRITER_OPTIONS = "group_size:1,uncompressed"
_NUM_THREADS = min(8, os.cpu_count() or 1)
_MAX_UNFINISHED = 2  # shards that are hashed or uploaded while the next ones are computed


class ShardWriter:
    """One shard under way; nothing of it counts before `finish`."""

    def __init__(self, folder: AnyPath, number: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._folder = folder
        self._number = number
        self._scratch = None
        if isinstance(folder, ObjectPath):
            self._scratch = tempfile.TemporaryDirectory(prefix="sdx-")
            self._file = Path(self._scratch.name) / records_name(number)
        else:
            self._file = folder / f"{_draft_prefix(number)}{os.urandom(4).hex()}.tmp"
        self._writer = ArrayRecordWriter(str(self._file), WRITER_OPTIONS)
        self._num_records = 0

    @property
    def num_records(self) -> int:
        """Records added."""
        return self._num_records

    def add(self, record: bytes) -> None:
        """Appends a record; OSError where the file system does not take it."""
        with self._telling():
            self._writer.write(record)
        self._num_records += 1

    def finish(self, bad_images: Mapping[int, BadImage]) -> None:
        """Makes the shard one of the cache; OSError where the file system did not take it all."""
        with self._telling():
            self._writer.close()
            if _count_records(self._file) != self._num_records:
                raise RuntimeError("not all was written")
        digest = digest_file(self._file)
        shard = Shard(self._num_records, self._file.stat().st_size, digest, dict(bad_images))
        if self._scratch is not None and isinstance(self._folder, ObjectPath):
            upload(self._file.parent, self._folder)
            self._scratch.cleanup()
        elif isinstance(self._folder, Path):
            with open(self._file, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._file, self._folder / records_name(self._number))
        write_json(self._folder / f"{self._number:05d}.json", shard.to_json())

    def discard(self) -> None:
        """Removes what was written."""
        if self._writer.is_open():
            with suppress(RuntimeError):  # what could not be written
                self._writer.close()
        self._file.unlink(missing_ok=True)
        if self._scratch is not None:
            self._scratch.cleanup()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """ArrayRecord's error of writing as an OSError that names the file."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise OSError(f"{self._file}: {reason}; is the disk full?") from error


class Finisher:
    """Finishes shards beside the computation; at most a few wait, an error is raised by the next
    call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sdx-shard")
        self._pending: list[Future[None]] = []

    def finish(self, shard: ShardWriter, bad_images: Mapping[int, BadImage]) -> None:
        """As `shard.finish`, soon."""
        self._pending.append(self._thread.submit(shard.finish, bad_images))
        while len(self._pending) > _MAX_UNFINISHED:
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Returns when all are finished."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """Lets the shard under way end; those that wait are dropped."""
        self._thread.shutdown(cancel_futures=True)


@contextmanager
def finishing() -> Iterator[Finisher]:
    """A Finisher that has finished all at the end, unless an error comes first."""
    finisher = Finisher()
    try:
        yield finisher
        finisher.wait()
    finally:
        finisher.close()


def sound_shards(
    folder: AnyPath, numbers: Iterable[int], *, should_stop: Callable[[], bool]
) -> dict[int, Shard]:
    """The finished shards among these, by number: local ones are read and compared with their
    digest, those of a store by size (their readers compare digests). Drafts that a killed process
    left of them are removed."""
    numbers = list(numbers)
    if isinstance(folder, Path):
        for number in numbers:
            for draft in folder.glob(f"{_draft_prefix(number)}*"):
                draft.unlink(missing_ok=True)
    sizes = folder.files() if isinstance(folder, ObjectPath) else {}

    def judged(number: int) -> Shard | None:
        if should_stop():
            return None
        shard, name = read_shard(folder, number), records_name(number)
        if shard is None:
            return None
        if isinstance(folder, ObjectPath):
            return shard if sizes.get(name) == shard.num_bytes else None
        return shard if _is_sound(folder / name, shard) else None

    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sdx-digest") as threads:
        found = dict(zip(numbers, threads.map(judged, numbers), strict=True))
    return {number: shard for number, shard in found.items() if shard is not None}


def forget_shards(folder: AnyPath, numbers: Iterable[int]) -> None:
    """Removes what says that these shards are finished, before they are made anew; their records
    stay until then."""
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sdx-forget") as threads:
        files = [folder / f"{number:05d}.json" for number in numbers]
        list(threads.map(lambda file: file.unlink(missing_ok=True), files))


def digest_file(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _is_sound(file: Path, shard: Shard) -> bool:
    try:
        return file.stat().st_size == shard.num_bytes and digest_file(file) == shard.sha256
    except FileNotFoundError:
        return False


def _count_records(file: Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
    try:
        return reader.num_records()
    finally:
        reader.close()


def _draft_prefix(number: int) -> str:
    return f".{number:05d}."
