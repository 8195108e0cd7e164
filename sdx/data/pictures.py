"""The pictures of a folder with the captions that it gives them, for evaluation.

Layout as in imagefolder.py, without its splits: pictures nest; a caption comes from a row of
`metadata.jsonl` or `metadata.csv` in the picture's folder or the topmost, or from the `.txt` file
beside it. Pictures need no caption, and none is decoded here.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sdx.data.source import BadImageError, DataError
from sdx.data.sources.metadata import TABLES, check_inside, read_caption_file, read_table

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")


@dataclass(frozen=True)
class Picture:
    """A file, and its first caption if it has one."""

    path: Path
    caption: str | None


def list_pictures(folder: Path, *, caption_column: str = "text") -> list[Picture]:
    """All pictures in and below `folder`, in the order of their paths.

    Raises DataError where there are none, or a table in it cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one with JPEG, PNG or WEBP files.")
    root = folder.resolve()
    paths, captions = [], {}
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES:
                check_inside(path, root, str(path))
                paths.append(path)
            elif name in TABLES:
                rows = read_table(path, root, caption_column).items()
                captions |= {image: row.captions[0] for image, row in rows if row.captions}
    if not paths:
        raise DataError(f"{folder}: no pictures in it; put JPEG, PNG or WEBP files there.")
    paths.sort(key=lambda path: path.as_posix())
    return [Picture(path, captions.get(path) or _beside(path, root)) for path in paths]


def _beside(path: Path, root: Path) -> str | None:
    """The caption in the .txt file of a picture's name."""
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        return read_caption_file(file, root) or None
    except BadImageError as error:
        raise DataError(f"{file}: {error.reason} ({error.detail}); save it as UTF-8.") from error
