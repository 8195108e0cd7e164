"""The code that jobs run: sdx as it is at this moment, copied aside and never changed again.

A snapshot is named by its content, the commit and the uncommitted changes, so that all jobs of the
same code share one. It holds what git tracks, as it is in the work tree, and what it does not track
below `sdx/`, `conf/` and `launchers/`; of an installed sdx, or without git, those packages. Other
packages are not in it, those with sdx.plugins included: jobs run what is installed where they run.

    <folder>/<digest>/  snapshot.json, pyproject.toml, sdx/, conf/, launchers/, …
    <folder>/<digest>/  snapshot.json, pyproject.toml, sdx/, sdx_launchers/, hydra_plugins/ (wheel)
"""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdx.record.files import DamagedRecord, now, read_json
from sdx.record.git import git_names, work_tree
from sdx.record.installed import pyproject
from sdx.record.provenance import (
    PACKAGE,
    SNAPSHOT_RECORD,
    UNTRACKED,
    git_commit,
    uncommitted_changes,
)
from sdx.record.redact import redact

_CHECKOUT = (*UNTRACKED, "constraints", "pyproject.toml", "README.md")  # without git
_WHEEL = ("sdx", "sdx_launchers", "hydra_plugins/sdx")
_SOURCE_ROOT = "launchers"  # of a checkout: on the path of Python beside its top
_MAX_UNTRACKED_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{16}")
_DRAFT_LIVES_S = 3600.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class SnapshotError(ValueError):
    """Code that cannot be copied aside; nothing was started."""


@dataclass(frozen=True)
class Snapshot:
    """`python -P` with PYTHONPATH=`python_path` runs it; `path` is what pip can install.

    `digest` names the content; `commit` is what it was taken from, None without git.
    """

    path: Path
    digest: str
    commit: str | None

    @property
    def python_path(self) -> tuple[Path, ...]:
        root = self.path / _SOURCE_ROOT
        return (self.path, root) if root.is_dir() else (self.path,)


def take_snapshot(folder: Path, package: Path = PACKAGE) -> Snapshot:
    """The snapshot of `package` and what belongs to it, below `folder`; taken if it is not there.

    Any number of processes may do so at once. A snapshot that lost files, or whose files were
    changed, is put aside and taken again.

    Raises:
        SnapshotError: names all files that cannot be copied, or the folder that takes none.
    """
    folder = folder.absolute()
    try:
        return _take(folder, package)
    except OSError as error:
        raise SnapshotError(
            f"{folder}: takes no snapshot of the code ({error}); make room there, or use another "
            "run.output_dir."
        ) from error


def remove_snapshots(folder: Path) -> list[str]:
    """Deletes all snapshots below `folder`, and nothing else there; returns their digests. For
    whoever knows that no job runs one of them, or is about to."""
    removed: list[str] = []
    for path in sorted(folder.iterdir()):
        if _DIGEST.fullmatch(path.name) is None or not (path / SNAPSHOT_RECORD).is_file():
            continue
        aside = path.with_name(f".{uuid.uuid4().hex}.tmp")  # nobody takes half of one for it
        os.rename(path, aside)
        shutil.rmtree(aside)
        removed.append(path.name)
    return removed


def pack(snapshot: Snapshot) -> bytes:
    """The snapshot as a tar.gz, always the same bytes; its files lie at the top."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in (*_record(snapshot.path)["files"], SNAPSHOT_RECORD):
            archive.add(snapshot.path / name, name, recursive=False, filter=_anonymous)
    return packed.getvalue()


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _take(folder: Path, package: Path) -> Snapshot:
    folder.mkdir(parents=True, exist_ok=True)
    _remove_old_drafts(folder)
    draft = folder / f".{uuid.uuid4().hex}.tmp"
    draft.mkdir(mode=0o700)
    try:
        record = _copy(package, draft)
        path = folder / record["digest"]
        _put_in_place(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Snapshot(path, record["digest"], record["commit"])


def _copy(package: Path, draft: Path) -> Mapping[str, Any]:
    """Fills `draft`; what its snapshot.json says."""
    top, names, untracked = _source(package)
    faults: list[str] = []
    files: dict[str, str] = {}
    for name in sorted(names):
        try:
            most = _MAX_UNTRACKED_BYTES if name in untracked else None
            _copy_file(top, name, draft, most)
            files[name] = _content(draft / name)
        except FileNotFoundError:  # removed in the work tree, or a link that leads nowhere
            continue
        except (OSError, SnapshotError) as error:
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise
            faults.append(f"  {name}: {getattr(error, 'strerror', None) or error}")
    if faults:
        raise SnapshotError(
            "\n".join([f"{top}: {len(faults)} files cannot be in a snapshot of the code:", *faults])
            + "\nMake them readable, move them away, or name untracked ones in .gitignore."
        )
    if "pyproject.toml" not in files and (text := pyproject()) is not None:
        (draft / "pyproject.toml").write_text(text, encoding="utf-8")
        files["pyproject.toml"] = _content(draft / "pyproject.toml")
    patch = uncommitted_changes(package)
    record = {
        "digest": "",
        "taken": now(),
        "commit": git_commit(package),
        "patch": None if patch is None else redact(patch),
        "files": files,
    }
    record["digest"] = _digest(record)
    (draft / SNAPSHOT_RECORD).write_text(json.dumps(record, indent=2))  # ASCII: names may be any
    (draft / SNAPSHOT_RECORD).chmod(0o400)
    return record


def _source(package: Path) -> tuple[Path, set[str], set[str]]:
    """The top of the source tree, the names of its files from there, and which are untracked."""
    top = package.parent
    if (top / SNAPSHOT_RECORD).is_file():
        return top, set(_record(top)["files"]), set()
    tracked_by = work_tree(package)
    if tracked_by is not None:
        tracked = git_names(tracked_by)
        others = git_names(tracked_by, "--others", "--exclude-standard", "--", *UNTRACKED)
        if tracked is not None and others is not None:
            untracked = set(_files(tracked_by, others))
            return tracked_by, {*_files(tracked_by, tracked), *untracked}, untracked
    is_checkout = (top / "conf" / "config.yaml").is_file()
    return top, set(_files(top, _CHECKOUT if is_checkout else _WHEEL)), set()


def _files(top: Path, names: Iterable[str]) -> Iterator[str]:
    """`names`, and for a folder (a repository inside, as git lists it) what lies below it."""
    for name in names:
        path = top / name
        if path.is_symlink() or not path.is_dir():
            yield name.rstrip("/")
            continue
        for folder, folders, files in os.walk(path):
            here = Path(folder)
            links = [inner for inner in folders if (here / inner).is_symlink()]
            folders[:] = [inner for inner in folders if inner not in ("__pycache__", ".git")]
            for inner in (*files, *links):
                yield (here / inner).relative_to(top).as_posix()


def _copy_file(top: Path, name: str, draft: Path, most: int | None) -> None:
    """A file, or what a link to one leads to; a link to a folder of the same tree stays a link."""
    path, copy = top / name, draft / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        target = os.readlink(path)
        if os.path.isabs(target) or not path.resolve().is_relative_to(top.resolve()):
            raise SnapshotError("a link to a folder outside of the source tree")
        copy.symlink_to(target)
        return
    stat = path.stat()
    if not path.is_file():
        raise SnapshotError("not a file")
    if most is not None and stat.st_size > most:
        size, limit = stat.st_size >> 20, most >> 20
        raise SnapshotError(f"untracked and {size} MiB large; up to {limit} MiB are copied")
    with open(path, "rb") as source, open(copy, "xb") as sink:
        shutil.copyfileobj(source, sink)
    copy.chmod(stat.st_mode & 0o555)


def _content(path: Path) -> str:
    """What is the same for two files with the same content."""
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{'executable' if path.stat().st_mode & 0o100 else 'file'} {digest}"


def _digest(record: Mapping[str, Any]) -> str:
    what = [record["files"], record["commit"], record["patch"]]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _put_in_place(draft: Path, path: Path) -> None:
    """Renames `draft` to `path`, unless that holds the same, whole."""
    while not _is_whole(path):
        with suppress(FileNotFoundError):
            os.rename(path, path.with_name(f".{uuid.uuid4().hex}.tmp"))
        try:
            os.rename(draft, path)
            return
        except OSError as error:  # another process was first; what it put there is looked at
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _is_whole(path: Path) -> bool:
    try:
        record = _record(path)
        found = {name: _content(path / name) for name in record["files"]}
        return found == record["files"] and _digest(record) == path.name
    except (OSError, DamagedRecord, KeyError, TypeError):
        return False


def _record(path: Path) -> dict[str, Any]:
    record = read_json(path / SNAPSHOT_RECORD)
    if record is None:
        raise DamagedRecord(f"{path / SNAPSHOT_RECORD}: missing.")
    return record


def _remove_old_drafts(folder: Path) -> None:
    """What killed processes left; a young one may be of a process at work."""
    for draft in folder.glob(".*.tmp"):
        try:
            if time.time() - draft.stat().st_mtime > _DRAFT_LIVES_S:
                shutil.rmtree(draft, ignore_errors=True)
        except FileNotFoundError:
            continue
