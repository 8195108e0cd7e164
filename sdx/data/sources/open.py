"""Where training examples come from: the source that a configuration names."""

from collections.abc import Callable

from sdx.config.schema import DataConfig, DataKind
from sdx.config.splits import Split, parse_split
from sdx.data.shapes import ShapesSource
from sdx.data.source import DataError, Part, Source
from sdx.data.sources.arrayrecord import ArrayRecordRecords
from sdx.data.sources.checked import CheckedSource, Records
from sdx.data.sources.columns import Columns
from sdx.data.sources.huggingface import open_huggingface
from sdx.data.sources.imagefolder import ImageFolderRecords
from sdx.data.sources.parquet import open_parquet
from sdx.data.sources.plugins import open_plugin
from sdx.data.sources.webdataset import WebDatasetRecords

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
    if config.kind in _SOURCES:
        source = _part(_SOURCES[config.kind](config, split.name, resolution), split)
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


def _open_plugin(config: DataConfig, split: str, resolution: int) -> Source:
    if config.plugin is None:
        raise DataError("data.plugin=null: data=plugin needs the name of one; set data.plugin.")
    return open_plugin(config.plugin, config.options, split=split, resolution=resolution)


def _imagefolder(config: DataConfig, split: str, say: Say) -> Records:
    return ImageFolderRecords(_folder(config), split=split, caption_column=config.caption_column)


def _huggingface(config: DataConfig, split: str, say: Say) -> Records:
    if config.name is None and config.dir is None:
        raise DataError("data.name=null: data=huggingface needs data.name=OWNER/NAME, or data.dir.")
    return open_huggingface(
        config.name,
        config.dir,
        config=config.config,
        revision=config.revision,
        split=split,
        columns=_columns(config),
    )


def _parquet(config: DataConfig, split: str, say: Say) -> Records:
    return open_parquet(_folder(config), files=config.files, split=split, columns=_columns(config))


def _webdataset(config: DataConfig, split: str, say: Say) -> Records:
    return WebDatasetRecords(
        _folder(config),
        files=config.files,
        split=split,
        caption_column=config.caption_column,
        say=say,
    )


def _arrayrecord(config: DataConfig, split: str, say: Say) -> Records:
    return ArrayRecordRecords(
        _folder(config), files=config.files, split=split, columns=_columns(config), say=say
    )


def _folder(config: DataConfig) -> str:
    if config.dir is None:
        raise DataError(
            f"data.dir=null: data={config.kind.name} needs the folder of the data; set"
            " data.dir=FOLDER."
        )
    return config.dir


def _columns(config: DataConfig) -> Columns:
    return Columns(config.image_column, config.caption_column)


_RECORDS: dict[DataKind, Callable[[DataConfig, str, Say], Records]] = {
    DataKind.imagefolder: _imagefolder,
    DataKind.huggingface: _huggingface,
    DataKind.parquet: _parquet,
    DataKind.webdataset: _webdataset,
    DataKind.arrayrecord: _arrayrecord,
}

# These make their examples themselves.
_SOURCES: dict[DataKind, Callable[[DataConfig, str, int], Source]] = {
    DataKind.shapes: _open_shapes,
    DataKind.plugin: _open_plugin,
}
