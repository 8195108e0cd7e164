"""Captions of an image folder: `metadata.jsonl` and `metadata.csv` tables, and `.txt` files.

A table is one document: whatever is wrong in it (encoding, syntax, a missing column, a file named
twice, a path that leaves the folder) is a `DataError` that names file and line, for the whole run,
since the reader can no longer tell what its author meant. A `.txt` file belongs to one image, and
what is wrong in it is that image's fault only.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from sdx.data.captions import caption_texts
from sdx.data.source import BadImageError, DataError

TABLES = ("metadata.jsonl", "metadata.csv")
_FILE_NAME = "file_name"
_MAX_FAULTS_SHOWN = 5

Row = dict[str, object]


@dataclass(frozen=True)
class Listed:
    """An image as a table lists it: the captions there, none where the cell is blank, and the place
    of the row.
    """

    captions: tuple[str, ...]
    place: str


class _RowFault(ValueError):
    """What is wrong with one row."""


def read_table(table: Path, root: Path, caption_column: str) -> dict[Path, Listed]:
    """Image paths, resolved against the table's folder, with their captions.

    Every path lies in `root` by its spelling and after following links. Raises `DataError` with all
    faults of the table, the first five spelt out.
    """
    rows = list(_READERS[table.name](table))
    _check_columns(table, rows, caption_column)
    listed: dict[Path, Listed] = {}
    faults = []
    for line, row in rows:
        try:
            image = _image_path(row.get(_FILE_NAME), table.parent, root)
            if image in listed:
                raise _RowFault(
                    f"{row[_FILE_NAME]!r} is listed before, in line"
                    f" {listed[image].place.rpartition(':')[2]}; give several captions as a list"
                    " in metadata.jsonl"
                )
            captions = caption_texts(row.get(caption_column), caption_column)
            listed[image] = Listed(captions, f"{table}:{line}")
        except ValueError as fault:
            faults.append(f"{table}:{line}: {fault}")
    if faults:
        raise DataError(_first(faults))
    return listed


def read_caption_file(path: Path, root: Path) -> str:
    """The caption in a `.txt` file, its whole text without blanks around it; one that leaves `root`
    is a `DataError`.

    Raises `BadImageError` where it is not UTF-8.
    """
    check_inside(path, root, str(path))
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadImageError("caption not UTF-8", f"{path.name}: {error.reason}") from error
    except OSError as error:
        raise BadImageError("caption unreadable", f"{path.name}: {error.strerror}") from error


def check_inside(path: Path, root: Path, place: str) -> None:
    """Raises `DataError` where `path` is outside of `root` once links are followed; `root` has
    none.
    """
    try:
        target = path.resolve()
    except RuntimeError:  # a loop of links, before Python 3.13; it leads nowhere
        return
    if not target.is_relative_to(root):
        raise DataError(
            f"{place}: a link that leads out of data.dir, to {target}; images and captions must lie"
            f" in {root}. Copy them in (cp -rL follows links), or give data.dir the folder of both."
        )


def _read_jsonl(table: Path) -> Iterator[tuple[int, Row]]:
    faults = []
    for line, raw in enumerate(_read_bytes(table).split(b"\n"), start=1):
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            faults.append(f"{table}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            faults.append(f"{table}:{line}: not a JSON object ({error}); write one on each line")
        else:
            if isinstance(row, dict):
                yield line, row
            elif text:
                faults.append(
                    f"{table}:{line}: a JSON {type(row).__name__}, must be an object such as"
                    ' {"file_name": "0001.png", "text": "a caption"}'
                )
    if faults:
        raise DataError(_first(faults))


def _read_csv(table: Path) -> Iterator[tuple[int, Row]]:
    raw = _read_bytes(table)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{table}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8."
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error(f"more cells than the {len(reader.fieldnames or ())} columns")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise DataError(
            f"{table}:{reader.reader.line_num}: not a CSV row ({error}); quote cells that"
            " hold commas, quotes or line breaks."
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = dict(
    zip(TABLES, (_read_jsonl, _read_csv), strict=True)
)


def _read_bytes(table: Path) -> bytes:
    try:
        return table.read_bytes()
    except OSError as error:
        raise DataError(
            f"{table}: cannot be read ({error.strerror}); make it a readable file."
        ) from error


def _check_columns(table: Path, rows: list[tuple[int, Row]], caption_column: str) -> None:
    columns = dict.fromkeys(name for _, row in rows for name in row)
    if not rows:
        raise DataError(f"{table}: holds no rows; list the images in it, or remove it.")
    if _FILE_NAME not in columns:
        raise DataError(
            f"{table}: no column {_FILE_NAME!r}; its columns are {_quoted(columns)}. Name the"
            f" images in {_FILE_NAME!r}, relative to this file."
        )
    if caption_column not in columns:
        others = [name for name in columns if name != _FILE_NAME]
        raise DataError(
            f"data.caption_column={caption_column}: {table} has no such column; its columns are"
            f" {_quoted(columns)}."
            + (f" Set data.caption_column={others[0]}." if len(others) == 1 else " Name one.")
        )


def _quoted(names: dict[str, None]) -> str:
    return ", ".join(repr(name) for name in names)


def _image_path(name: object, folder: Path, root: Path) -> Path:
    """The path of a row's image; its spelling may not leave the folder, whatever the system."""
    if not isinstance(name, str) or not name.strip():
        raise _RowFault(f"{_FILE_NAME} is {name!r}, must be the name of an image")
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if "\0" in name:
        raise _RowFault(f"{_FILE_NAME} {name!r} holds a NUL character; name a file in {folder}")
    if posix.is_absolute() or windows.drive or windows.root:
        raise _RowFault(f"{_FILE_NAME} {name!r} is absolute; write it relative to {folder}")
    if ".." in posix.parts or ".." in windows.parts:
        raise _RowFault(f"{_FILE_NAME} {name!r} has '..' in it; images must lie in {folder}")
    path = folder / posix
    try:
        check_inside(path, root, f"{_FILE_NAME} {name!r}")
    except DataError as error:
        raise _RowFault(str(error).rstrip(".")) from error
    return path


def _first(faults: list[str]) -> str:
    shown = faults[:_MAX_FAULTS_SHOWN]
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more")
    return "\n".join(shown) + "."
