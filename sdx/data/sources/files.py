"""Which files of a folder hold a split's examples, for data that is stored in shards."""

import re
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG

from sdx.data.source import BadImageError, DataError

_MAX_FILE_BYTES = 1 << 30  # files are read whole
_KNOWN_SPLITS = ("train", "validation", "test")


def existing_folder(folder: Path) -> Path:
    """The folder, absolute and without links in its path; DataError where there is none."""
    folder = folder.expanduser()
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise DataError(
            f"data.dir={folder}: {what}, must be the folder of the data; give its path, absolute"
            f" or relative to {Path.cwd()}."
        )
    return folder.resolve()


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and modification time; `BadImageError` where there is no such file."""
    try:
        stat = path.stat()
    except FileNotFoundError as error:
        raise BadImageError("missing", "no such file") from error
    except OSError as error:
        raise BadImageError("unreadable", str(error.strerror)) from error
    if not S_ISREG(stat.st_mode):  # reading a pipe would wait for ever
        raise BadImageError("unreadable", "not a file")
    return stat.st_size, stat.st_mtime_ns


def read_image_file(path: Path) -> bytes:
    """The content of a file; `BadImageError` where it cannot be had."""
    num_bytes, _ = file_stamp(path)
    if num_bytes > _MAX_FILE_BYTES:
        raise BadImageError("over-large", f"{num_bytes} > {_MAX_FILE_BYTES} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImageError("unreadable", str(error.strerror)) from error


def split_files(root: Path, pattern: str | None, suffixes: Iterable[str], split: str) -> list[Path]:
    """The files under `root` that hold the examples of `split`, in the order of their paths.

    Looked at are those that match `pattern`, or without one all that end in one of `suffixes`;
    names that begin with a dot are not. A file belongs to a split whose name is a word of its path
    (`train/0.tar`, `data/train-00000-of-00002.parquet`); train also has those that name no split,
    where none names it. Raises DataError, listing the splits that there are.
    """
    files = _matching(root, pattern, tuple(suffixes))
    if not files:
        wanted = f"data.files={pattern}" if pattern else " or ".join(f"*{s}" for s in suffixes)
        raise DataError(
            f"data.dir={root}: no file in it matches {wanted}; give the folder that holds them, or"
            " their pattern as data.files."
        )
    names = {path.relative_to(root).as_posix(): path for path in files}
    return [names[name] for name in names_of_split(names, split, str(root))]


def names_of_split(names: Iterable[str], split: str, place: str) -> list[str]:
    """Those of the files' names that hold the examples of `split`, by the words of their paths."""
    words = {name: set(re.split(r"[^A-Za-z0-9]+", name)) for name in names}
    named = [name for name in words if split in words[name]]
    if not named and split == "train":
        named = [name for name in words if words[name].isdisjoint(_KNOWN_SPLITS)]
    if not named:
        there = [
            split for split in _KNOWN_SPLITS if any(split in found for found in words.values())
        ]
        if "train" not in there and any(w.isdisjoint(_KNOWN_SPLITS) for w in words.values()):
            there = ["train", *there]
        raise DataError(
            f"data.split={split}: no file of {place} is of that split; there are"
            f" {', '.join(there)}. A file belongs to the split that is a word of its path."
        )
    return named


def _matching(root: Path, pattern: str | None, suffixes: tuple[str, ...]) -> list[Path]:
    found = [
        path
        for path in root.glob(pattern or "**/*")
        if (pattern or path.name.lower().endswith(suffixes))
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
