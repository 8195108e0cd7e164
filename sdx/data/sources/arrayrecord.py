"""`data=arrayrecord`: ArrayRecord files whose records are `tf.train.Example` messages.

That is what TensorFlow Datasets writes with `file_format="array_record"`, and `write` here: a list
of bytes named like the image column with one image file (JPEG, PNG or WEBP), and one named like
the caption column with one or more texts in UTF-8. Other features are not read.
"""

import json
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sdx.data.captions import caption_texts
from sdx.data.source import BadImageError, DataError
from sdx.data.sources.columns import IMAGE, TEXT, Columns, check_columns
from sdx.data.sources.files import existing_folder, split_files
from sdx.data.sources.remembered import INDEX_CACHE, recall, remember
from sdx.data.sources.tf_example import make_example, parse_example

SUFFIXES = (".array_record", ".arrayrecord")

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_VERSION = 1  # of what an index holds
_Captions = tuple[tuple[str, ...], str, str]  # of a record; or why it has none, and what was seen
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")


def write(
    path: str | Path,
    examples: Iterable[tuple[bytes | Path, str | Sequence[str]]],
    columns: Columns | None = None,
) -> int:
    """Writes (image file or its content, caption or captions) pairs to `path`; returns how many.

    The file appears when it is complete.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    columns = columns or Columns()
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    # one record in a group, for random access; images are compressed already
    writer = ArrayRecordWriter(str(draft), "group_size:1,uncompressed")
    num_records = 0
    try:
        for image, captions in examples:
            content = image.read_bytes() if isinstance(image, Path) else image
            texts = [captions] if isinstance(captions, str) else captions
            features = {columns.image: [content], columns.caption: [t.encode() for t in texts]}
            writer.write(make_example(features))
            num_records += 1
    finally:
        writer.close()
    os.replace(draft, path)
    return num_records


class ArrayRecordRecords:
    """The records of a split's files, one file after the other; see `checked.Records`."""

    def __init__(
        self,
        dir: str | Path,
        *,
        files: str | None,
        split: str,
        columns: Columns | None = None,
        say: Callable[[str], None] = print,
        index_cache: Path | None = INDEX_CACHE,
    ):
        root = existing_folder(Path(dir))
        self._columns = columns or Columns()
        self._files = split_files(root, files, SUFFIXES, split)
        self._stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self._files]
        self._readers = _Readers(self._files)
        numbers = range(len(self._files))
        self._ends = list(accumulate(self._readers.open(n).num_records() for n in numbers))
        self._names = [path.relative_to(root).as_posix() for path in self._files]
        self.place = str(root)
        self.key = f"arrayrecord {root} {files} {split} {self._columns.image}"
        self.provenance: dict[str, Any] = {}
        if not len(self):
            raise DataError(f"data.dir={dir}: no record in the {len(self._files)} files there.")
        self._check_first()
        self._captions = [row for n in numbers for row in self._index(n, index_cache, say)]

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        number, position = self._place(index)
        return f"{self._names[number]}:{position}"

    def stamp(self, index: int) -> tuple[int, ...]:
        """Of the file, and the record's place in it."""
        number, position = self._place(index)
        return *self._stamps[number], position

    def image(self, index: int) -> bytes:
        values = self._example(index).get(self._columns.image)
        if not isinstance(values, list) or not values:
            raise BadImageError("missing", f"{self._columns.image} is empty")
        return values[0]

    def captions(self, index: int) -> tuple[str, ...]:
        texts, reason, detail = self._captions[index]
        if reason:
            raise BadImageError(reason, detail)
        return texts

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the file, and the position in it."""
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _example(self, index: int) -> dict[str, list[bytes] | str]:
        number, position = self._place(index)
        try:
            (record,) = self._readers.open(number).read([position])
            return parse_example(record)
        except (RuntimeError, ValueError, IndexError) as error:  # damaged, or no such message
            raise BadImageError("unreadable", str(error).splitlines()[0]) from error

    def _index(
        self, number: int, cache: Path | None, say: Callable[[str], None]
    ) -> list[_Captions]:
        """Captions of a file's records, remembered: reading one reads its image too."""
        column = self._columns.caption
        key = json.dumps([_VERSION, str(self._files[number]), *self._stamps[number], column])
        known = _read_index(recall(cache, key))
        if known is not None:
            return known
        first = self._ends[number - 1] if number else 0
        rows = [self._read_captions(index) for index in range(first, self._ends[number])]
        remember(cache, key, rows, say)
        return rows

    def _read_captions(self, index: int) -> _Captions:
        column = self._columns.caption
        try:
            values = self._example(index).get(column)
            texts = [value.decode() for value in values] if isinstance(values, list) else []
        except UnicodeDecodeError as error:
            return (), "caption not UTF-8", f"{column}: {error.reason}"
        except BadImageError as error:
            return (), error.reason, error.detail
        captions = caption_texts(texts, column)
        return (captions, "", "") if captions else ((), "no caption", f"{column} is blank")

    def _check_first(self) -> None:
        """Raises DataError where the first record is no example, or lacks a column."""
        try:
            first = self._example(0)
        except BadImageError as error:
            raise DataError(
                f"{self._files[0]}: its records are no tf.train.Example messages"
                f" ({error.detail}); sdx.data.sources.arrayrecord.write makes such files."
            ) from error
        if "moments" in first and self._columns.image not in first:
            raise DataError(
                f"{self._files[0]}: holds moments, as MaxDiffusion caches them, and no images;"
                " train from the images, and cache them with sdx.encode."
            )
        kinds = {name: _kind(values) for name, values in first.items()}
        check_columns(kinds, self.place, self._columns)


class _Readers:
    """One reader for each file, opened where first used, also after a copy to another process."""

    def __init__(self, files: list[Path]):
        self._files = files
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Readers, (self._files,)

    def open(self, number: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if number not in self._open:
                reader = ArrayRecordReader(str(self._files[number]), _RANDOM_ACCESS)
                if not reader.ok():  # it opens anything, and finds no records in it
                    raise DataError(
                        f"{self._files[number]}: no whole ArrayRecord file; get it again."
                    )
                self._open[number] = reader
            return self._open[number]


def _read_index(rows: Any) -> list[_Captions] | None:
    """What this file remembered; None for anything else."""
    try:
        return [(tuple(texts), str(reason), str(detail)) for texts, reason, detail in rows]
    except (TypeError, ValueError):
        return None


def _kind(values: list[bytes] | str) -> str:
    """What a feature can be, by what the first record has of it."""
    if isinstance(values, str):
        return values
    if values and values[0].startswith(_MAGIC):
        return IMAGE
    try:
        _ = [value.decode() for value in values]
    except UnicodeDecodeError:
        return "bytes"
    return TEXT
