"""`data=parquet`: local parquet or arrow files in `data.dir`."""

from pathlib import Path

from sdx.data.sources.columns import Columns
from sdx.data.sources.files import existing_folder, split_files
from sdx.data.sources.tables import SUFFIXES, TableRecords, read_files


def open_parquet(dir: str, *, files: str | None, split: str, columns: Columns) -> TableRecords:
    """The rows of the files of `split` under `dir`; `files` is their pattern. See `split_files`."""
    root = existing_folder(Path(dir))
    found = split_files(root, files, SUFFIXES, split)
    return TableRecords(
        read_files(found, str(root)),
        place=str(root),
        files=found,
        columns=columns,
        image_root=root,
    )
