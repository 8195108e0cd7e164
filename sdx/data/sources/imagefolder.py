"""A folder of images with captions.

Layout: images and tables lie in `data.dir`, or in the folder named like the split under it; then
only that folder's images count, and a table may lie in either. Folders nest. A caption comes from
the row of a `metadata.jsonl` or `metadata.csv` that names the image relative to the table, or else
from the `.txt` file beside the image. Names that begin with a dot are not looked at.

What becomes of what is wrong:

- the run stops (`DataError`): a table that cannot be read as one (see metadata.py), an image listed
  by two rows, a path or link that leaves `data.dir`, a split other than train without its folder,
  no image at all;
- the image is left out and counted (checked.py): it is missing, unreadable, empty, no JPEG, PNG
  or WEBP, over-large, too thin, truncated or corrupt; it has no caption, or one that is not UTF-8;
  its name is not UTF-8.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdx.data.source import BadImageError, DataError
from sdx.data.sources.files import existing_folder, file_stamp, read_image_file
from sdx.data.sources.metadata import TABLES, Listed, check_inside, read_caption_file, read_table

# Formats sdx does not read are listed too: such an image is reported, not passed over in silence.
IMAGE_SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif .jxl".split()
)


class ImageFolderRecords:
    """The images of a folder, in the order of their paths; see `checked.Records`.

    Links may lead anywhere in `links_to`, by default `dir` itself.
    """

    def __init__(
        self,
        dir: str | Path,
        *,
        split: str = "train",
        caption_column: str = "text",
        links_to: Path | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        self._root = existing_folder(Path(dir))
        self._links_to = links_to or self._root
        self.provenance = dict(provenance or {})
        base = _split_folder(self._root, split)
        files, tables = _walk(self._root, base, self._links_to)
        self._listed = _read_tables(tables, self._links_to, base, caption_column)
        self._paths = sorted({*files, *self._listed}, key=lambda path: path.as_posix())
        if not self._paths:
            raise DataError(
                f"data.dir={dir}: no images in {base}; put JPEG, PNG or WEBP files there, with"
                " captions in metadata.jsonl, metadata.csv or a .txt file beside each."
            )
        self.place = str(self._root)
        self.key = f"imagefolder {base}"

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index].relative_to(self._root).as_posix()

    def stamp(self, index: int) -> tuple[int, ...]:
        """Size and modification time."""
        return file_stamp(self._paths[index])

    def image(self, index: int) -> bytes:
        return read_image_file(self._paths[index])

    def captions(self, index: int) -> tuple[str, ...]:
        path = self._paths[index]
        if path in self._listed:
            captions = self._listed[path].captions
            if not captions:
                raise BadImageError("no caption", f"blank in {self._listed[path].place}")
            return captions
        file = path.with_suffix(".txt")
        if not file.is_file():
            raise BadImageError("no caption", f"no row in a table, and no {file.name}")
        caption = read_caption_file(file, self._links_to)
        if not caption:
            raise BadImageError("no caption", f"{file.name} is blank")
        return (caption,)


def _split_folder(root: Path, split: str) -> Path:
    if not split or split != Path(split).name or split in (".", ".."):
        raise DataError(
            f"data.split={split!r}: must be the name of a folder in data.dir; use train, or the"
            " name alone."
        )
    base = root / split
    if base.is_dir():
        check_inside(base, root, str(base))
        return base
    if split != "train":
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        raise DataError(
            f"data.split={split}: {root} has no such folder, it has"
            f" {', '.join(folders) or 'none'}; only the split train may be data.dir itself."
        )
    return root


def _walk(root: Path, base: Path, links_to: Path) -> tuple[list[Path], list[Path]]:
    """Images under `base`, and the tables there and in `root`; links stay in `links_to`."""
    images = []
    tables = [root / name for name in TABLES if base != root and (root / name).is_file()]
    for folder, folders, names in os.walk(base, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink() and not name.startswith("."):
                check_inside(path, links_to, str(path))
        images += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
        tables += [Path(folder, name) for name in TABLES if name in names]
    return images, tables


def _raise(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot be listed ({error.strerror}); make the folder readable."
    ) from error


def _read_tables(
    tables: list[Path], root: Path, base: Path, caption_column: str
) -> dict[Path, Listed]:
    """What the tables say of images under `base`; rows of other splits in a table of `root` are
    left.
    """
    listed: dict[Path, Listed] = {}
    for table in tables:
        check_inside(table, root, str(table))
        for path, row in read_table(table, root, caption_column).items():
            if path in listed:
                raise DataError(
                    f"{row.place}: {path.name} is listed before, in {listed[path].place}; list each"
                    " image once, with several captions as a list in metadata.jsonl."
                )
            if path.is_relative_to(base):
                listed[path] = row
    return listed
