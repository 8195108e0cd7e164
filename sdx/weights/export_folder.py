"""The folder that a model is written to: taken whole or not at all, and only where it may be."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from sdx.record.files import DamagedRecord, read_json, replace_folder, write_json
from sdx.record.scratch import scratch_folder
from sdx.record.store import AnyPath, ObjectPath, upload
from sdx.weights.export import ExportError

RECORD = "sdx.json"
_SHOWN = 3


@contextmanager
def export_folder(folder: AnyPath, record: Mapping[str, Any]) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once all is written.

    `record` becomes `sdx.json` in it; its key `of` says what was exported. Raises ExportError where
    `check_replaceable` does; an OSError names a path.
    """
    folder = folder.expanduser().resolve()  # a link stays, what it points to is replaced
    check_replaceable(folder, record["of"])
    is_object = isinstance(folder, ObjectPath)
    try:
        with _replace_objects(folder) if is_object else replace_folder(folder) as draft:
            yield draft
            write_json(draft / RECORD, {**record, "files": sorted(_files(draft))})
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # a full disk has none


@contextmanager
def _replace_objects(folder: ObjectPath) -> Iterator[Path]:
    """`replace_folder` in a store: files one by one, the record last. Meanwhile, and after a kill
    for good, another record lies there, so that the files are known as ours; it has no step."""
    with scratch_folder() as draft:
        yield draft
        of, old = read_json(draft / RECORD) or {}, exported(folder).get("files", [])
        files = {*_files(draft)}
        write_json(folder / RECORD, {"of": of.get("of"), "files": sorted({*files, *old})})
        for stale in {*old} - files:
            (folder / stale).unlink(missing_ok=True)
        upload(draft, folder, last=RECORD)


def check_replaceable(folder: AnyPath, of: str) -> None:
    """Raises ExportError if `folder` holds anything but an earlier export of the same thing."""
    folder = folder.expanduser().absolute()
    if not folder.exists():
        if isinstance(folder, ObjectPath):
            return
        above = next(parent for parent in folder.parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ExportError(f"{folder}: cannot be made in {above}; use another folder.")
        return
    if folder.is_file():
        raise ExportError(f"{folder}: is a file; use another folder.")
    record = exported(folder)
    ours = {RECORD, *record.get("files", [])}
    foreign = list(islice((name for name in _files(folder) if name not in ours), _SHOWN))
    if foreign:
        raise ExportError(
            f"{folder}: holds what sdx did not export ({', '.join(foreign)}); use an empty folder "
            "or a new one."
        )
    if record and record.get("of") != of:
        raise ExportError(
            f"{folder}: holds an export of {record.get('of')}, not of {of}; use another folder."
        )


def exported(folder: AnyPath) -> dict[str, Any]:
    """The record of the export in `folder`; empty where there is none."""
    try:
        return read_json(folder / RECORD) or {}
    except DamagedRecord:
        return {}


def _files(folder: AnyPath) -> Iterator[str]:
    """Relative paths of all files below `folder`, as they come."""
    if isinstance(folder, ObjectPath):
        yield from folder.files()
        return
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in names)
