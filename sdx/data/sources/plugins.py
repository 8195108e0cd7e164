"""`data=plugin`: sources from other packages, found by their entry point.

A package that declares

    [project.entry-points."sdx.plugins"]
    my_source = "my_package.sources:open_mine"

makes `data=plugin data.plugin=my_source data.options='{folder: x}'` call

    open_mine(options, *, split, resolution) -> Source

with `data.options` as a dict, the name of the split without a slice, and the side of training
images in pixels. What it returns is a `Source` (source.py): a fingerprint that names the content,
a length, and examples by index. Slices of the split, shuffling, crops and captions are sdx's
business. The object must be picklable where `data.num_workers` is above 0.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np

from sdx.data.source import BadImage, BadImageError, DataError, Example, Source

GROUP = "sdx.plugins"


class PluginFault(RuntimeError):
    """A plugin's source gave something that is no example, or failed while training."""


def open_plugin(name: str, options: Mapping[str, Any], *, split: str, resolution: int) -> Source:
    """The source that the plugin `name` makes; whatever goes wrong names it (`DataError`)."""
    found = _entry_point(name)
    called = f"data.plugin={name} ({found.value}{_version(found)})"
    try:
        make: Callable[..., Any] = found.load()
        source = make(dict(options), split=split, resolution=resolution)
    except DataError as error:
        raise DataError(f"{called}: {error}", error.bad_images) from error
    except Exception as error:
        raise DataError(
            f"{called}: raised {type(error).__name__}: {error}{_where(error)}; mend it there, or"
            " check data.options."
        ) from error
    if not isinstance(source, Source) or not isinstance(source.fingerprint, str):
        raise DataError(
            f"{called}: gave a {type(source).__name__}, must be a source: an object with a text"
            " `fingerprint`, `__len__` and `__getitem__` (sdx.data.source.Source)."
        )
    return PluginSource(source, called)


class PluginSource:
    """A plugin's source whose failures name the plugin."""

    def __init__(self, source: Source, called: str):
        self._source = source
        self._called = called
        self._length = len(source)
        self.fingerprint = source.fingerprint
        self.bad_images: Sequence[BadImage] = getattr(source, "bad_images", ())
        self.provenance: dict[str, Any] = dict(getattr(source, "provenance", {}))
        if (sizes := getattr(source, "sizes", None)) is not None:
            self.sizes = sizes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> Example:
        try:
            example = self._source[index]
        except BadImageError:
            raise
        except Exception as error:
            raise PluginFault(
                f"{self._called}: example {index}: {type(error).__name__}: {error}{_where(error)}"
            ) from error
        if fault := _fault(example):
            raise PluginFault(f"{self._called}: example {index}: {fault}")
        return example


def _fault(example: Any) -> str:
    """What is wrong with what a plugin gave; empty where nothing is."""
    if not isinstance(example, Example):
        return f"is a {type(example).__name__}, must be an sdx.data.source.Example"
    image = np.asarray(example.image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        return f"its image is {image.dtype} {image.shape}, must be uint8 (height, width, 3)"
    captions = example.captions
    if not isinstance(captions, tuple) or not captions:
        return "has no captions, must have a tuple of at least one"
    if not all(isinstance(caption, str) for caption in captions):
        return "a caption of it is no text"
    return ""


def _entry_point(name: str) -> EntryPoint:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        there = f"installed are {', '.join(sorted(found))}" if found else "none is installed"
        raise DataError(
            f"data.plugin={name}: no installed package has such an entry point in {GROUP!r};"
            f" {there}. Install the package that has it."
        )
    return found[name]


def _version(point: EntryPoint) -> str:
    return f", {point.dist.name} {point.dist.version}" if point.dist is not None else ""


def _where(error: BaseException) -> str:
    """File and line where the plugin failed."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace else ""
