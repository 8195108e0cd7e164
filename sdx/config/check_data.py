"""Rules of `data.*`: which source takes which key, and what a source needs.

Pure, as check.py: whether a folder, a dataset or a split exists is found out where it is opened.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath, PureWindowsPath

from sdx.config.errors import Problem
from sdx.config.leaves import spelled
from sdx.config.schema import HUB_ID, Config, DataKind
from sdx.config.splits import parse_split

_FOLDERS = (
    DataKind.imagefolder,
    DataKind.huggingface,
    DataKind.parquet,
    DataKind.webdataset,
    DataKind.arrayrecord,
)
_SHARDS = (DataKind.parquet, DataKind.webdataset, DataKind.arrayrecord)
_TABLES = (DataKind.huggingface, DataKind.parquet, DataKind.arrayrecord)
_STORED = (*_FOLDERS, DataKind.plugin)

Need = tuple[Callable[[Config], bool], str]


def _kinds(*kinds: DataKind) -> Need:
    *others, last = (kind.name for kind in kinds)
    names = f"{', '.join(others)} or {last}" if others else last
    return lambda config: config.data.kind in kinds, f"data={names}"


def is_shapes(config: Config) -> bool:
    """Whether examples are drawn, so that a judge knows what they show."""
    return config.data.kind is DataKind.shapes


def _asks_hub(config: Config) -> bool:
    return config.data.kind is DataKind.huggingface and config.data.dir is None


_OF_HUB: Need = (_asks_hub, "data=huggingface without data.dir")

NEEDS: dict[str, Need] = {
    "data.name": _OF_HUB,
    "data.revision": _OF_HUB,
    "data.config": _kinds(DataKind.huggingface),
    "data.dir": _kinds(*_FOLDERS),
    "data.files": _kinds(*_SHARDS),
    "data.plugin": _kinds(DataKind.plugin),
    "data.options": _kinds(DataKind.plugin),
    "data.image_column": _kinds(*_TABLES),
    "data.caption_column": _kinds(*_FOLDERS),
    "data.max_bad_fraction": _kinds(*_STORED),
    "data.max_pixels": _kinds(*_FOLDERS),
    "data.interpolation": _kinds(*_STORED),
    "data.buckets": _kinds(*_STORED),
    "data.num_examples": (is_shapes, "data=shapes"),
}
"""Keys that do something with some sources only."""


def data_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the keys of the source."""
    yield from _missing(config)
    yield from _place(config)
    data, limit = config.data, config.train.max_samples
    if is_shapes(config) and limit and data.num_examples and limit > data.num_examples:
        rule = f"at most data.num_examples={data.num_examples}"
        yield Problem("train.max_samples", str(limit), rule)
    try:
        parse_split(data.split)
    except ValueError as error:
        yield Problem("data.split", data.split, str(error))
    try:
        json.dumps(data.options, allow_nan=False)
    except (TypeError, ValueError):
        rule = "must hold texts, finite numbers, true, false, null, lists and maps only"
        yield Problem("data.options", spelled(data.options), rule)


def _missing(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.kind in _FOLDERS and data.kind is not DataKind.huggingface and not data.dir:
        yield Problem("data.dir", None, "missing", f"data={data.kind.name} needs data.dir=FOLDER")
    if data.kind is DataKind.huggingface and not data.name and not data.dir:
        fix = "data=huggingface needs data.name=OWNER/NAME, or data.dir=FOLDER for a local copy"
        yield Problem("data.name", None, "missing", fix)
    if data.kind is DataKind.plugin and not data.plugin:
        yield Problem("data.plugin", None, "missing", "data=plugin needs data.plugin=NAME")
    if is_shapes(config) and data.num_examples is None:
        yield Problem("data.num_examples", "null", "data=shapes needs a number of examples")


def _place(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.dir is not None and re.match(r"[A-Za-z][\w+.-]*:(?!\\)", data.dir):
        rule = "must be a folder of this machine: sources are read by their files"
        yield Problem("data.dir", data.dir, rule, "copy or mount the data")
    name = data.name
    is_path = name is not None and name.startswith(("/", ".", "~"))
    if name is not None and not is_path and not re.fullmatch(HUB_ID, name):
        yield Problem("data.name", name, "must be OWNER/NAME, or the path of a folder")
    if data.files is not None and _leaves(data.files):
        yield Problem("data.files", data.files, "must be a pattern below data.dir, such as *.tar")


def _leaves(pattern: str) -> bool:
    """Whether a pattern of files is none, or leads out of the folder it counts from."""
    posix, windows = PurePosixPath(pattern), PureWindowsPath(pattern)
    is_rooted = posix.is_absolute() or bool(windows.drive or windows.root)
    has_odd_stars = any("**" in part and part != "**" for part in posix.parts)
    return not pattern or is_rooted or has_odd_stars or ".." in posix.parts or ":" in pattern
