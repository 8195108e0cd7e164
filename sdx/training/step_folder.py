"""A step on disk: Orbax's files, and a manifest with the sha256 of each that says it is whole."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

from sdx.record.store import AnyPath, ObjectPath, StoreError

FileProof = list[Any]  # [sha256, bytes]: as JSON gives it back
ArrayKind = list[Any]  # [shape, dtype]

MANIFEST = "manifest.json"
_FORMAT = 1
_DIGEST_THREADS = 4


class Damaged(Exception):
    """Why a step folder is not the checkpoint it claims to be."""


def step_folders(folder: AnyPath) -> list[tuple[int, AnyPath]]:
    """Folders named by a number, ascending, whatever they hold; in a store those with a manifest,
    for the others are on their way."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(((int(path.name), path) for path in named if _is_step(path)), key=itemgetter(0))


def _is_step(path: AnyPath) -> bool:
    return (path / MANIFEST).exists() if isinstance(path, ObjectPath) else path.is_dir()


def steps(folder: AnyPath) -> list[int]:
    """Steps with a manifest of their own number, ascending; their digests are not checked."""
    found = []
    for step, path in step_folders(folder):
        try:
            read_manifest(path, step)
        except Damaged:
            continue
        found.append(step)
    return found


def write_manifest(
    path: Path, step: int, files: dict[str, FileProof], arrays: dict[str, ArrayKind]
) -> None:
    manifest = {"format": _FORMAT, "step": step, "files": files, "arrays": arrays}
    text = json.dumps({**manifest, "sha256": manifest_digest(manifest)}, indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: AnyPath, step: int) -> dict[str, Any]:
    """The manifest of the step folder `path`; raises Damaged unless it is whole and of `step`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except FileNotFoundError:
        raise Damaged("it has no manifest") from None
    except StoreError:  # says nothing about the step
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"its manifest is unreadable ({error})") from error
    if digest != manifest_digest(manifest):
        raise Damaged("its manifest does not match its own digest")
    if manifest["step"] != step or path.name != str(step):
        raise Damaged(f"its manifest is of step {manifest['step']}")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def prove_files(folder: Path) -> dict[str, FileProof]:
    """sha256 and size of every file below `folder`, flushed to the disk on the way."""

    def prove(path: Path) -> tuple[str, FileProof]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return path.relative_to(folder).as_posix(), [digest, path.stat().st_size]

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        return dict(pool.map(prove, files))


def check_digests(folder: Path, files: Mapping[str, FileProof]) -> None:
    """Raises Damaged where a file of the local `folder` is not the one that was proven."""

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
        raise Damaged(faults[0] + more)
