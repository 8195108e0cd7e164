"""Which files of a folder hold a split's examples, for data that is stored in shards."""

import re
from collections.abc import Iterable
from pathlib import Path

from sdx.data.source import DataError

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
    words = {path: set(_words(path.relative_to(root))) for path in files}
    named = [path for path in files if split in words[path]]
    if not named and split == "train":
        named = [path for path in files if words[path].isdisjoint(_KNOWN_SPLITS)]
    if not named:
        there = [name for name in _KNOWN_SPLITS if any(name in words[path] for path in files)]
        if "train" not in there and any(w.isdisjoint(_KNOWN_SPLITS) for w in words.values()):
            there = ["train", *there]
        raise DataError(
            f"data.split={split}: no file of {root} is of that split; there are"
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


def _words(path: Path) -> list[str]:
    return re.split(r"[^A-Za-z0-9]+", path.as_posix())
