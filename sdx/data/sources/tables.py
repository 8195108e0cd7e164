"""Rows with an image and a caption in each: parquet and arrow files, and what `save_to_disk` wrote.

The `datasets` library maps them into memory. Parquet is no format for single rows, so a copy in
arrow is made once, in that library's cache (`HF_DATASETS_CACHE`). It decodes no image: formats,
limits and colours are those of images.py, as everywhere. It is imported when tables are opened.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdx.data.captions import caption_texts
from sdx.data.source import BadImageError, DataError
from sdx.data.sources.columns import IMAGE, TEXT, Columns, check_columns
from sdx.data.sources.files import file_stamp, read_image_file

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".parquet", ".arrow")

_ROWS_AT_ONCE = 10_000
_VALUES = {"binary": IMAGE, "large_binary": IMAGE, "string": TEXT, "large_string": TEXT}


class TableRecords:
    """The rows of a table; see `checked.Records`.

    An image is stored as bytes, or as the path of a file, which must then lie in `image_root` (no
    other file is opened, whatever a table says). `files` are those that the rows are stored in.
    Raises DataError where a column is missing or holds something else.
    """

    def __init__(
        self,
        table: "Dataset",
        *,
        place: str,
        files: Sequence[Path],
        columns: Columns,
        image_root: Path | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        kinds = {name: _kind(feature) for name, feature in table.features.items()}
        check_columns(kinds, place, columns)
        self._table = _with_bytes(table, columns.image)
        self._columns = columns
        self._captions: list[object] = list(table[columns.caption])
        self._image_root = image_root
        self._stamp = _stamp(files)
        self._is_elsewhere = list(chain.from_iterable(_are_elsewhere(self._table, columns.image)))
        self.place = place
        self.key = f"tables {sorted(map(str, files))} {columns.image}"
        self.provenance = dict(provenance or {})

    def __len__(self) -> int:
        return len(self._captions)

    def name(self, index: int) -> str:
        return f"row {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        try:
            captions = caption_texts(self._captions[index], self._columns.caption)
        except ValueError as error:
            raise BadImageError("no caption", str(error)) from error
        if not captions:
            raise BadImageError("no caption", f"{self._columns.caption} is blank")
        return captions

    def stamp(self, index: int) -> tuple[int, ...]:
        """That of the table's files, and of the image's own where the row has only its path."""
        if not self._is_elsewhere[index]:
            return self._stamp
        return *self._stamp, *file_stamp(self._file(self._table[index][self._columns.image]))

    def image(self, index: int) -> bytes:
        stored = self._table[index][self._columns.image]
        if self._is_elsewhere[index]:
            return read_image_file(self._file(stored))
        return stored["bytes"] if isinstance(stored, dict) else stored

    def _file(self, stored: Any) -> Path:
        """The file whose path a row holds."""
        path = stored.get("path") if isinstance(stored, dict) else None
        if path is None:
            raise BadImageError("missing", f"{self._columns.image} is empty")
        root = self._image_root
        try:
            file = None if root is None else (root / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
            raise BadImageError("unreadable", f"{path!r}: {error}") from error
        if root is None or file is None or not file.is_relative_to(root):
            raise BadImageError("missing", f"no bytes, only the path of a file elsewhere: {path}")
        return file


def read_files(files: Sequence[Path], place: str) -> "Dataset":
    """The rows of parquet or arrow files, one file after the other."""
    from datasets import load_dataset

    formats = {path.suffix.lower().lstrip(".") for path in files}
    if len(formats) > 1:
        raise DataError(
            f"{place}: holds parquet and arrow files of one split; give the pattern of either as"
            " data.files, such as **/*.parquet."
        )
    try:
        return load_dataset(*formats, data_files=[str(path) for path in files], split="train")
    except Exception as error:  # pyarrow's and the library's own, of many kinds
        reason = _innermost(error)
        raise DataError(
            f"{place}: its {formats.pop()} files cannot be read ({reason}); get them again, and"
            " keep files of other columns elsewhere."
        ) from error


def read_saved(folder: Path, split: str) -> "Dataset":
    """The rows of a split that `save_to_disk` wrote into `folder`."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder}: what save_to_disk wrote there cannot be read ({_innermost(error)}); save"
            " it again."
        ) from error
    parts = saved if isinstance(saved, DatasetDict) else {saved.split or "train": saved}
    there = {str(name): table for name, table in parts.items()}
    if split not in there:
        raise DataError(f"data.split={split}: {folder} has the splits {', '.join(there)}.")
    return there[split]


def saved_files(table: "Dataset") -> list[Path]:
    """The files that a table is mapped from."""
    return [Path(file["filename"]) for file in table.cache_files]


def _kind(feature: Any) -> str:
    """`IMAGE` or `TEXT` for what can be one, else the type's name."""
    from datasets import Image, List, Value

    if isinstance(feature, Image):
        return IMAGE
    if isinstance(feature, dict):
        kinds = [_kind(feature.get(name)) for name in ("bytes", "path")]
        return IMAGE if kinds[0] in (IMAGE, "null") and kinds[1] in (TEXT, "null") else "struct"
    if isinstance(feature, List):
        inner = _kind(feature.feature)
        return TEXT if inner == TEXT else f"list of {inner}"
    if isinstance(feature, Value):
        return _VALUES.get(feature.dtype, feature.dtype)
    return type(feature).__name__


def _with_bytes(table: "Dataset", image_column: str) -> "Dataset":
    """The image column alone, not decoded."""
    from datasets import Image

    table = table.select_columns([image_column]).with_format(None)
    if isinstance(table.features[image_column], Image):
        return table.cast_column(image_column, Image(decode=False))
    return table


def _are_elsewhere(table: "Dataset", image_column: str) -> Iterator[list[bool]]:
    """Of each row whether it holds no bytes; those that are there are not read."""
    for rows in cast(Any, table.with_format("arrow")).iter(_ROWS_AT_ONCE):
        for chunk in rows[image_column].chunks:
            content = chunk.field("bytes") if hasattr(chunk, "field") else chunk
            absent = content.is_null().to_pylist()
            yield [a or b for a, b in zip(absent, chunk.is_null().to_pylist(), strict=True)]


def _stamp(files: Sequence[Path]) -> tuple[int, ...]:
    """Of names, sizes and modification times."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    digest = hashlib.blake2b(repr(stats).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big"),)


def _innermost(error: BaseException) -> str:
    """The first line of the error that began it all."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
