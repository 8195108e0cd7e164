"""Files that are either the old or the new one, never half of each, and carry no secret.

Everything a run folder holds as text goes through here, except what is appended to: metrics, log.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from sdx.record.redact import redact
from sdx.record.store import AnyPath, ObjectPath, write_bytes


class DamagedRecord(ValueError):
    """A file of a run folder that something else than sdx has written to."""


def write_text(path: AnyPath, text: str) -> None:
    """Replaces `path` in one act, secrets blotted out; a crash leaves the old or the new text."""
    write_bytes(path, redact(text).encode())


def write_json(path: AnyPath, value: Mapping[str, Any]) -> None:
    """Replaces `path` in one act; enums are written by member name, paths as text."""
    write_text(path, to_json(value))


def to_json(value: Mapping[str, Any]) -> str:
    """As `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n"


def read_json(path: AnyPath) -> dict[str, Any] | None:
    """The object in `path`, None without such a file; DamagedRecord if it is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DamagedRecord(
            f"{path}: not readable as JSON ({error}); move it away to go on."
        ) from error
    if not isinstance(value, dict):
        raise DamagedRecord(f"{path}: holds {type(value).__name__}, not a JSON object.")
    return value


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end.

    After an error `folder` is as it was. What a killed process left of its own attempt is removed.
    """
    draft, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def now() -> str:
    """This moment in UTC, to the second, as every record spells it: 2026-11-21T21:05:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath | ObjectPath):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
