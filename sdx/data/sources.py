"""Where training examples come from: the source that a configuration names."""

from collections.abc import Callable

from sdx.config.schema import DataConfig, DataKind
from sdx.data.imagefolder import ImageFolderSource
from sdx.data.shapes import ShapesSource
from sdx.data.source import DataError, Source


def open_source(
    config: DataConfig, *, resolution: int, say: Callable[[str], None] = print
) -> Source:
    """The source `data.kind` names; `say` is handed lines for the user.

    `resolution` is that of training images, which a procedural source draws at. Raises `DataError`.
    """
    return _SOURCES[config.kind](config, resolution, say)


def _open_shapes(config: DataConfig, resolution: int, say: Callable[[str], None]) -> Source:
    if config.num_examples is None:
        raise DataError("data.num_examples=null: data=shapes is endless; set the size of an epoch.")
    return ShapesSource(config.num_examples, resolution, config.split)


def _open_imagefolder(config: DataConfig, resolution: int, say: Callable[[str], None]) -> Source:
    if config.dir is None:
        raise DataError(
            "data.dir=null: data=imagefolder needs the folder of images and captions; set"
            " data.dir=FOLDER."
        )
    return ImageFolderSource(
        config.dir,
        split=config.split,
        caption_column=config.caption_column,
        max_bad_fraction=config.max_bad_fraction,
        max_pixels=config.max_pixels,
        say=say,
    )


_SOURCES: dict[DataKind, Callable[[DataConfig, int, Callable[[str], None]], Source]] = {
    DataKind.shapes: _open_shapes,
    DataKind.imagefolder: _open_imagefolder,
}
