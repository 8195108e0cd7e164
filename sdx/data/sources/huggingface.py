"""`data=huggingface`: a dataset of the Hugging Face Hub, or a local copy of one.

A dataset is a repository whose files are data: parquet or arrow tables, or images with
`metadata.jsonl`. Its card may name configurations and say which files each split of them has.
Loading scripts are neither downloaded nor run. What `save_to_disk` of the `datasets` library wrote
is read too.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from sdx.data.source import DataError
from sdx.data.sources.checked import Records
from sdx.data.sources.columns import Columns
from sdx.data.sources.files import existing_folder, names_of_split
from sdx.data.sources.hub import Repository, open_repository
from sdx.data.sources.imagefolder import IMAGE_SUFFIXES, ImageFolderRecords
from sdx.data.sources.metadata import TABLES
from sdx.data.sources.tables import SUFFIXES, TableRecords, read_files, read_saved, saved_files

_SAVED = ("dataset_info.json", "dataset_dict.json")
_CARD = "README.md"
_DEFAULT = "default"
_COUNTED = re.compile(r"-\d+(-of-(?P<count>\d+))(-[0-9a-f]{8,})?")


def open_huggingface(
    name: str | None,
    dir: str | None,
    *,
    config: str | None,
    revision: str | None,
    split: str,
    columns: Columns,
) -> Records:
    """The records of a split; `dir`, or a `name` that is a folder here, is read instead of the Hub.

    Raises DataError.
    """
    folder = _local(name, dir)
    if folder is None:
        assert name is not None, "checked by the configuration"
        return _open_remote(open_repository(name, revision), config, split, columns)
    place = str(folder)
    if revision is not None:
        _refuse_idle("data.revision", revision, f"{place} is a local copy")
    if any((folder / file).is_file() for file in _SAVED) and _is_saved(folder):
        if config is not None:
            _refuse_idle("data.config", config, f"save_to_disk wrote {place}")
        table = read_saved(folder, split)
        return TableRecords(
            table, place=place, files=saved_files(table), columns=columns, image_root=folder
        )
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.as_posix() for path in files if not path.parts[0].startswith("."))
    chosen = _choose(names, _card(folder), config, split, place)
    return _open(folder, chosen, split, columns, place=place, root=folder)


def _refuse_idle(key: str, got: str, reason: str) -> NoReturn:
    raise DataError(f"{key}={got}: has no effect, {reason}; leave it out.")


def _local(name: str | None, dir: str | None) -> Path | None:
    """The folder of a local copy, or None where the Hub is asked."""
    if dir is not None:
        return existing_folder(Path(dir))
    path = Path(name or "").expanduser()
    if name is None or not (path.is_dir() or path.is_absolute() or name.startswith((".", "~"))):
        return None
    return existing_folder(path)


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder; repositories have a dataset_info.json at times."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _open_remote(
    repository: Repository, config: str | None, split: str, columns: Columns
) -> Records:
    place = f"{repository.name} at commit {repository.commit[:7]}"
    chosen = _choose(repository.files, _card(repository.folder), config, split, place)
    tables = [name for name in repository.files if PurePosixPath(name).name in TABLES]
    repository.download([*chosen, *(tables if _are_images(chosen) else [])])
    provenance = {"source": repository.name, "commit": repository.commit}
    return _open(
        repository.folder,
        chosen,
        split,
        columns,
        place=place,
        root=repository.root,
        provenance=provenance,
    )


def _open(
    folder: Path,
    chosen: Sequence[str],
    split: str,
    columns: Columns,
    *,
    place: str,
    root: Path,
    provenance: Mapping[str, Any] | None = None,
) -> Records:
    """The records in these files of a repository's folder; images and links may lie in `root`."""
    if _are_images(chosen):
        if columns.image != Columns().image:
            _refuse_idle("data.image_column", columns.image, f"{place} holds image files")
        return ImageFolderRecords(
            folder,
            split=split,
            caption_column=columns.caption,
            links_to=root,
            provenance=provenance,
        )
    files = [folder / name for name in chosen]
    return TableRecords(
        read_files(files, place),
        place=place,
        files=files,
        columns=columns,
        image_root=root,
        provenance=provenance,
    )


def _are_images(chosen: Sequence[str]) -> bool:
    return chosen[0].lower().endswith(IMAGE_SUFFIXES)


def _card(folder: Path) -> dict[str, Any]:
    """The metadata of the dataset's card; empty without one."""
    from huggingface_hub import DatasetCard

    file = folder / _CARD
    if not file.is_file():
        return {}
    try:
        card = DatasetCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except Exception as error:  # YAML errors of many kinds
        raise DataError(f"{file}: its metadata cannot be read ({error}); repair it.") from error
    return card.data.to_dict()


def _choose(
    names: Sequence[str], card: Mapping[str, Any], config: str | None, split: str, place: str
) -> list[str]:
    """Names of the files that hold the split, of all that there are."""
    configs = {
        str(entry.get("config_name", _DEFAULT)): entry
        for entry in card.get("configs") or []
        if isinstance(entry, dict)
    }
    if configs:
        entry = configs[_chosen_config(configs, config, place)]
        found = _by_card(names, entry, split, place)
        if found is not None:
            found = _readable(found, place)
            _check_complete(names, found, place)
            return found
    elif config is not None:
        names = [name for name in names if name.startswith(f"{config}/")]
        if not names:
            raise DataError(
                f"data.config={config}: {place} names no configurations, and has no folder of that"
                " name; leave data.config out."
            )
    found = _readable(names, place)
    if not _are_images(found):
        found = names_of_split(found, split, place)
        _check_complete(names, found, place)
    return found


def _chosen_config(configs: Mapping[str, Any], config: str | None, place: str) -> str:
    by_default = [name for name, entry in configs.items() if entry.get("default")]
    name = config or next(iter([*by_default, *({_DEFAULT} & set(configs))]), None)
    if name is None and len(configs) == 1:
        name = next(iter(configs))
    if name is None:
        raise DataError(
            f"data.config=null: {place} has the configurations {', '.join(configs)}; set one."
        )
    if name not in configs:
        raise DataError(f"data.config={name}: {place} has {', '.join(configs)}.")
    return name


def _by_card(
    names: Sequence[str], entry: Mapping[str, Any], split: str, place: str
) -> list[str] | None:
    """The split's files as the card lists them; None where it leaves that to their names."""
    listed = entry.get("data_files")
    if listed is None:
        return None
    patterns = _patterns(listed)
    if split not in patterns:
        raise DataError(f"data.split={split}: {place} has {', '.join(patterns)}.")
    folder = str(entry.get("data_dir") or "").strip("/")
    full = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns[split]]
    found = [name for name in names if any(_matches(name, pattern) for pattern in full)]
    if not found:
        raise DataError(
            f"data.split={split}: no file of {place} matches {', '.join(full)}, as its card has"
            " them; get the whole of it."
        )
    return found


def _patterns(listed: Any) -> dict[str, list[str]]:
    """Patterns of files by split, from any of the forms that a card may have."""
    if isinstance(listed, dict):
        listed = [{"split": split, "path": path} for split, path in listed.items()]
    if not isinstance(listed, list):
        listed = [listed]
    patterns: dict[str, list[str]] = {}
    for entry in listed:
        if not isinstance(entry, dict):
            entry = {"split": "train", "path": entry}
        paths = entry.get("path") or []
        split = patterns.setdefault(str(entry.get("split", "train")), [])
        split += [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return patterns


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    without_folders = pattern.replace("**/", "")  # which match no folder too
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, without_folders)


def _check_complete(names: Sequence[str], chosen: Sequence[str], place: str) -> None:
    """Raises DataError where files are missing of those that the names of the chosen count.

    Without the Hub only the cache says what there is, and it may hold a part.
    """
    there = Counter(kind for name in names if (kind := _counted(name)) is not None)
    for kind in {kind for name in chosen if (kind := _counted(name)) is not None}:
        if there[kind] < kind[1]:
            raise DataError(
                f"{place}: has {there[kind]} of the {kind[1]} files {kind[0]}; connect to the Hub"
                " once, or complete the copy (to train on a part of them: data=parquet data.dir)."
            )


def _counted(name: str) -> tuple[str, int] | None:
    """What the files `…-00000-of-00002…` have in common, and how many there are of them."""
    match = _COUNTED.search(name)
    return match and (name.replace(match[0], f"-*{match[1]}", 1), int(match["count"]))


def _readable(names: Sequence[str], place: str) -> list[str]:
    """Those of the files that are tables, or else images; DataError where there are neither."""
    for suffixes in (*((suffix,) for suffix in SUFFIXES), IMAGE_SUFFIXES):
        if found := [name for name in names if name.lower().endswith(suffixes)]:
            return found
    if any(name.lower().endswith((".tar", ".tar.gz", ".tgz")) for name in names):
        fix = "its tar shards are read with data=webdataset, from a folder: download it and give"
        fix += " data.dir"
    elif any(name.endswith(".py") for name in names):
        fix = "it is a script, which sdx does not run; many have a copy in parquet, which"
        fix += " data.revision=refs/convert/parquet reads"
    else:
        fix = "convert it (docs/your_own_dataset.md)"
    raise DataError(f"{place}: holds neither parquet or arrow files nor images; {fix}.")
