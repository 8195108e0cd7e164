"""Paths in object stores: `as_path` gives pathlib's Path for a local name, ObjectPath for a URL.

An object appears whole or not at all. Nothing in a store can be renamed or appended to, and a
folder is there as long as something lies below it. What talks to a store is fsspec, imported with
the first URL; endpoint, region and credentials are s3fs's and gcsfs's affair, that is those of the
environment (AWS_ENDPOINT_URL, AWS_PROFILE, …), never of a configuration.
"""

import logging
import os
import shutil
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sdx.record.redact import redact
from sdx.record.scratch import scratch_folder

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
"""Schemes, and what fsspec reads them with."""
_EXTRAS = {"s3": "s3", "gs": "gcs"}
# Of one transfer: four files at once, and s3fs's parts of 50 MiB, so that it takes below 1 GiB.
_FILES_AT_ONCE = 4
_REQUESTS_AT_ONCE = 8  # of requests without content
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 4}, "gs": {}}
WAITS_S = (1.0, 4.0, 15.0, 40.0)  # between the tries of a transfer, after botocore's own
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, ValueError, TypeError)

Result = TypeVar("Result")


class StoreError(OSError):
    """An object store that cannot be used as asked; the text says what to do about it."""

    def __init__(self, text: str, *, may_pass: bool = False):
        super().__init__(redact(text))
        self.may_pass = may_pass
        """Whether another try may do."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or what its name begins with, as far as a pathlib.Path of it would be used."""

    scheme: str
    key: str
    """Bucket and name, without a slash at either end."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "ObjectPath":
        above = self.key.rpartition("/")[0]
        return ObjectPath(self.scheme, above or self.key)

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "ObjectPath":
        return self.with_name(self.stem + suffix)

    def expanduser(self) -> "ObjectPath":
        return self

    def absolute(self) -> "ObjectPath":
        return self

    def resolve(self) -> "ObjectPath":
        return self

    def exists(self) -> bool:
        """Whether there is such an object, or one below."""
        return self._call(lambda fs: fs.exists(self.key))

    def is_file(self) -> bool:
        return self._call(lambda fs: fs.isfile(self.key))

    def is_dir(self) -> bool:
        return self._call(lambda fs: fs.isdir(self.key))

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Objects and folders right below, sorted; none where there is no such folder."""
        try:
            names = self._call(lambda fs: fs.ls(self.key, detail=False))
        except FileNotFoundError:
            return
        for key in sorted(names):
            if key.rstrip("/") != self.key:  # an object of that very name, or a folder's marker
                yield ObjectPath(self.scheme, key.rstrip("/"))

    def glob(self, pattern: str) -> Iterator["ObjectPath"]:
        """What `iterdir` gives, of names that fit."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def files(self) -> dict[str, int]:
        """Bytes of every object below, by name from here, sorted."""
        return {name: int(info["size"]) for name, info in self._found().items()}

    def versions(self) -> dict[str, str]:
        """Of every object below, by name from here, sorted: another text after another put."""
        etags = ("ETag", "etag")  # as S3 spells it, and Google
        return {
            name: next(str(info[etag]) for etag in etags if etag in info)
            for name, info in self._found().items()
        }

    def size(self) -> int:
        return int(self._call(lambda fs: fs.info(self.key))["size"])

    def modified(self) -> float:
        """Seconds since 1970 of the last put, by the store's clock, which counts in seconds."""
        return self._call(lambda fs: fs.modified(self.key)).timestamp()

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """The content, or that part of it; FileNotFoundError without such an object."""
        return self._call(lambda fs: fs.cat_file(self.key, start=start, end=end))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        """Puts the object, in place of any of its name."""
        self._put(lambda fs: fs.pipe_file(self.key, content))

    def create(self, content: bytes) -> None:
        """Puts the object unless there is one: FileExistsError. One of many callers succeeds.

        A store without conditional puts refuses this, or replaces what is there without a word.
        """
        self._put(lambda fs: fs.pipe_file(self.key, content, mode="create"))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(str(self))
        self._delete()

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: folders come with what is put into them."""

    def _found(self) -> dict[str, dict[str, Any]]:
        """What the store says of every object below, by name from here, sorted."""
        found = self._call(lambda fs: fs.find(self.key, detail=True))
        start = len(self.key) + 1
        return {
            key[start:]: info
            for key, info in sorted(found.items())
            if key[start:] and not key.endswith("/")
        }

    def _copy(self, to: "ObjectPath") -> None:
        self._call(lambda fs: fs.cp_file(self.key, to.key))

    def _delete(self) -> None:
        self._call(lambda fs: fs.rm_file(self.key))

    def _put(self, act: Callable[[Any], object]) -> None:
        try:
            self._call(act)
        except FileNotFoundError:
            bucket = f"{self.scheme}://{self.key.partition('/')[0]}"
            raise StoreError(f"{self}: there is no {bucket}; make it, or use another.") from None

    def _call(self, act: Callable[[Any], Result]) -> Result:
        """What `act` does with the file system; OSError with the address where it fails."""
        try:
            return act(_file_system(self.scheme, os.getpid()))
        except (FileNotFoundError, FileExistsError) as error:
            raise type(error)(str(self)) from None
        except StoreError:
            raise
        except Exception as error:  # of botocore, aiohttp, google.auth: no common ancestor
            raise _explained(self, error) from error


AnyPath: TypeAlias = Path | ObjectPath


def as_path(text: str | AnyPath) -> AnyPath:
    """A URL as an ObjectPath, anything else as a Path with `~` expanded; StoreError for URLs that
    name no store sdx knows."""
    if isinstance(text, ObjectPath):
        return text
    scheme, mark, rest = str(text).partition("://")
    if not mark:
        return Path(text).expanduser()
    if problem := url_problem(str(text)):
        raise StoreError(f"{text}: {problem}.")
    return ObjectPath(scheme, "/".join(part for part in rest.split("/") if part))


def parse_path(text: str) -> AnyPath:
    """`as_path` of what stands on a command line."""
    try:
        return as_path(text)
    except StoreError as error:
        raise ArgumentTypeError(str(error)) from None


def url_problem(text: str) -> str | None:
    """What is wrong with a URL as a place in a store; None where nothing is."""
    scheme, _, rest = text.partition("://")
    if scheme not in PACKAGES:
        known = " or ".join(f"{name}://" for name in PACKAGES)
        return f"must be a local folder or begin with {known}"
    if not rest.strip("/"):
        return f"names no bucket; give {scheme}://BUCKET/…"
    if "@" in rest.partition("/")[0]:
        return "must not hold credentials; they are taken from the environment"
    if {".", ".."} & set(rest.split("/")) or set("?#*") & set(rest):
        return "must not hold . or .. as a folder, nor ? # *"
    return None


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Replaces `path` in one act: a crash leaves the old or the new content."""
    if isinstance(path, ObjectPath):
        return path.write_bytes(content)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_tree(path: AnyPath) -> None:
    """Removes `path` and all below it, in no order; harmless where there is nothing."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:  # fs.rm would read [ and * as patterns
        list(pool.map(lambda name: patiently((path / name)._delete), path.files()))


def upload(folder: Path, to: ObjectPath, *, last: str | None = None) -> None:
    """Puts every file below `folder` under `to`, several at a time; the one called `last` after all
    others are there, so that who finds it finds all."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    names = [name for name in sizes if name != last]
    here, there = [str(folder / name) for name in names], [f"{to.key}/{name}" for name in names]
    if names:
        patiently(lambda: to._put(lambda fs: fs.put(here, there, batch_size=_FILES_AT_ONCE)))
    if last is not None:
        put_last(to / last, (folder / last).read_bytes(), {name: sizes[name] for name in names})


def put_last(path: ObjectPath, content: bytes, after: Mapping[str, int]) -> None:
    """Puts an object once those `after` which it comes are there, beside it and below, with so many
    bytes each."""
    there = patiently(path.parent.files)
    if lost := [name for name, num_bytes in after.items() if there.get(name) != num_bytes]:
        raise StoreError(
            f"{path.parent}: {', '.join(lost[:3])} did not arrive; something removes them."
        )
    patiently(lambda: path.write_bytes(content))


def download(path: ObjectPath, folder: Path) -> None:
    """Every object below `path` as a file below `folder`, several at a time."""
    names = list(path.files())
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    there, here = [f"{path.key}/{name}" for name in names], [str(folder / name) for name in names]
    if names:
        patiently(lambda: path._call(lambda fs: fs.get(there, here, batch_size=_FILES_AT_ONCE)))


def move_tree(path: ObjectPath, to: ObjectPath, *, first: str) -> None:
    """What lies below `path`, copied within the store to `to` and removed, `first` before all."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        list(pool.map(lambda name: patiently(lambda: (path / name)._copy(to / name)), path.files()))
    (path / first).unlink(missing_ok=True)
    remove_tree(path)


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """A local folder with what lies below `path`, removed afterwards; `path` itself if local."""
    if isinstance(path, Path):
        yield path
        return
    with scratch_folder() as folder:
        download(path, folder)
        yield folder


def patiently(act: Callable[[], Result]) -> Result:
    """What `act` gives, tried again after `WAITS_S` where a store's trouble may pass."""
    for wait in WAITS_S:
        try:
            return act()
        except StoreError as error:
            if not error.may_pass:
                raise
        time.sleep(wait)
    return act()


@cache
def _file_system(scheme: str, pid: int) -> Any:
    """fsspec's for all threads of this process: its own cache makes one for each, with another
    connection. A forked child needs its own."""
    try:
        import fsspec  # with what it finds, 0.3 s: only runs in a store pay it

        # gcsfs logs a traceback of each request that it gives up; our error says as much
        logging.getLogger(PACKAGES[scheme]).setLevel(logging.CRITICAL)
        return fsspec.filesystem(scheme, use_listings_cache=False, **_OPTIONS[scheme])
    except ImportError as error:
        raise StoreError(
            f"{scheme}://: needs the package {PACKAGES[scheme]}, which cannot be imported "
            f"({error}); pip install 'sdx[{_EXTRAS[scheme]}]'."
        ) from error


def _explained(path: ObjectPath, error: Exception) -> StoreError:
    kind = type(error).__name__
    reason = " ".join(str(error).split()) or kind
    if kind in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return StoreError(
            f"{path}: no credentials ({reason}); log in, or set them in the environment."
        )
    if isinstance(error, PermissionError):
        return StoreError(f"{path}: refused ({reason}); check the credentials and their rights.")
    if isinstance(error, _PERMANENT):
        return StoreError(f"{path}: {kind}: {reason}")
    return StoreError(f"{path}: cannot be reached ({reason})", may_pass=True)
