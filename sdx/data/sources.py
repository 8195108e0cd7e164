"""Where training examples come from: the source that a configuration names."""

from collections.abc import Callable

from sdx.config.schema import DataConfig, DataKind
from sdx.config.splits import Split, parse_split
from sdx.data.checked import CheckedSource, Records
from sdx.data.imagefolder import ImageFolderRecords
from sdx.data.shapes import ShapesSource
from sdx.data.source import DataError, Part, Source

Say = Callable[[str], None]


def open_source(config: DataConfig, *, resolution: int, say: Say = print) -> Source:
    """The source that `data.kind` names, of the split or part of one that `data.split` names.

    `say` is handed lines for the user. `resolution` is that of training images, which a procedural
    source draws at. Raises `DataError`.
    """
    try:
        split = parse_split(config.split)
    except ValueError as error:
        raise DataError(f"data.split={config.split}: {error}.") from error
    if config.kind is DataKind.shapes:
        source = _part(_open_shapes(config, split.name, resolution), split)
    else:
        source = _checked(_RECORDS[config.kind](config, split.name, say), config, split, say)
    if not len(source):
        raise DataError(f"data.split={config.split}: holds no example; give a larger part.")
    return source


def _checked(records: Records, config: DataConfig, split: Split, say: Say) -> Source:
    if len(records) and not split.rows(len(records)):
        raise DataError(
            f"data.split={config.split}: holds none of the {len(records)} records of"
            f" {records.place}; give a larger part."
        )
    return CheckedSource(
        records,
        split,
        max_bad_fraction=config.max_bad_fraction,
        max_pixels=config.max_pixels,
        say=say,
    )


def _part(source: Source, split: Split) -> Source:
    rows = split.rows(len(source))
    return source if len(rows) == len(source) else Part(source, rows)


def _open_shapes(config: DataConfig, split: str, resolution: int) -> Source:
    if config.num_examples is None:
        raise DataError("data.num_examples=null: data=shapes is endless; set the size of an epoch.")
    return ShapesSource(config.num_examples, resolution, split)


def _folder_records(config: DataConfig, split: str, say: Say) -> Records:
    return ImageFolderRecords(_folder(config), split=split, caption_column=config.caption_column)


def _folder(config: DataConfig) -> str:
    if config.dir is None:
        raise DataError(
            f"data.dir=null: data={config.kind.name} needs the folder of the data; set"
            " data.dir=FOLDER."
        )
    return config.dir


_RECORDS: dict[DataKind, Callable[[DataConfig, str, Say], Records]] = {
    DataKind.imagefolder: _folder_records,
}
