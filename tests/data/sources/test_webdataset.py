"""Tar shards: what a sample is, what makes it none, and what is never read."""

import gzip
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sdx.config.schema import DataConfig, DataKind
from sdx.data.source import DataError
from sdx.data.sources import webdataset
from sdx.data.sources.checked import CheckedSource
from sdx.data.sources.open import open_source
from tests.data.sources.test_open import colours
from tests.data.stored import as_shards, plain, write_tar

pytestmark = [pytest.mark.usefixtures("own_caches"), pytest.mark.fast]

IMAGES = [example.image for example in plain(9)]


def opened(folder: Path, *, column: str = "text", files: str | None = None) -> CheckedSource:
    config = DataConfig(
        kind=DataKind.webdataset,
        dir=str(folder),
        caption_column=column,
        files=files,
        max_bad_fraction=1.0,
    )
    source = open_source(config, resolution=16, say=lambda line: None)
    assert isinstance(source, CheckedSource)
    return source


def refusal(folder: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, **options)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def bad(source: CheckedSource) -> dict[str, str]:
    return {image.path: image.reason for image in source.bad_images}


def test_captions_come_from_json_with_the_column_else_from_txt(tmp_path: Path) -> None:
    members = {
        "0.txt": b"beside",
        "0.json": b'{"text": ["first", "second"]}',
        "0.png": IMAGES[0],
        "1.png": IMAGES[1],
        "1.json": b'{"caption": "other"}',
        "1.txt": "\ufeffFüße \n".encode(),
        "2.a.txt": b"not a caption of 2",
        "2.png": IMAGES[2],
        "2.json": b'{"text": "two"}',
    }
    write_tar(tmp_path / "a.tar", members)
    source = opened(tmp_path)
    captions = [source[i].captions for i in range(len(source))]
    assert captions == [("first", "second"), ("Füße",), ("two",)]
    assert [opened(tmp_path, column="caption")[i].captions for i in (0, 1)] == [
        ("beside",),
        ("other",),
    ]


def test_halves_doubles_and_captions_that_are_none_are_bad(tmp_path: Path) -> None:
    members = {
        "good.png": IMAGES[0],
        "good.txt": b"good",
        "alone.txt": b"a caption and no image",
        "bare.png": IMAGES[1],
        "blank.png": IMAGES[2],
        "blank.txt": b" \n",
        "list.png": IMAGES[2],
        "list.json": b"[1]",
        "odd.png": IMAGES[2],
        "odd.json": b'{"text": 3}',
        "latin.png": IMAGES[2],
        "latin.txt": "Füße".encode("latin-1"),
        "long.png": IMAGES[2],
        "long.txt": b"x" * 1_100_000,
        "twice.png": IMAGES[3],
        "twice.txt": b"x",
        "twice.jpg": IMAGES[4],
        "a.gif": b"GIF89a",
        "a.txt": b"x",
    }
    write_tar(tmp_path / "a.tar", members)
    source = opened(tmp_path)
    assert colours(source) == [0]
    assert bad(source) == {
        "a.tar/alone": "missing",
        "a.tar/bare": "no caption",
        "a.tar/blank": "no caption",
        "a.tar/list": "caption unreadable",
        "a.tar/odd": "no caption",
        "a.tar/latin": "caption not UTF-8",
        "a.tar/long": "caption unreadable",
        "a.tar/twice": "duplicate key",
        "a.tar/a": "not an image",
    }


def test_one_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", {"a.png": IMAGES[number], "a.txt": b"x"})
    assert colours(opened(tmp_path)) == [0, 1]
    assert colours(opened(tmp_path, files="1.*")) == [1]


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


def test_nothing_is_run_extracted_or_followed(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    bomb = pickle.dumps(Bomb())
    members = {f"a.{suffix}": bomb for suffix in ("pkl", "pyd", "pickle", "npy", "pth", "cls")}
    members |= {"../../escape.png": IMAGES[0], "../../escape.txt": b"x", "a.png": IMAGES[1]}
    write_tar(folder / "a.tar", members | {"a.txt": b"x"})
    with tarfile.open(folder / "a.tar", "a") as tar:
        for name, target in (("b.png", "/etc/passwd"), ("c.png", "a.png")):
            link = tarfile.TarInfo(name)
            link.type = tarfile.SYMTYPE if name == "b.png" else tarfile.LNKTYPE
            link.linkname = target
            tar.addfile(link)
    source = opened(folder)
    assert sorted(colours(source)) == [0, 1] and source.bad_images == []
    assert [path.name for path in folder.iterdir()] == ["a.tar"]
    assert not (tmp_path.parent / "escape.png").exists()


@pytest.mark.parametrize("suffix", ["tar.gz", "tgz", "tar"])
def test_compressed_shards_are_refused_with_what_to_do(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": IMAGES[0], "a.txt": b"x"})
    content = gzip.compress(path.read_bytes())
    path.unlink()
    (tmp_path / f"a.{suffix}").write_bytes(content)
    assert "is compressed with gzip" in refusal(tmp_path)
    assert "unpack it once to a plain .tar" in refusal(tmp_path)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda content: content[:700], "cannot be read as a tar file"),
        (lambda content: content[: content.index(b"b.png")], "is cut off at byte"),
        (lambda content: content[: content.index(b"b.png") + 600], "cannot be read as a tar file"),
        (lambda content: content.replace(b"b.png", b"b\xffpng"), "is damaged at byte"),
        (lambda content: b"\xff" * 5000, "cannot be read as a tar file"),
        (lambda content: b"", "cannot be read as a tar file"),
    ],
)
def test_shards_that_are_not_whole_are_refused(
    tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    members = {name: IMAGES[1] * 9 for name in ("a.png", "b.png", "c.png")}
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(tmp_path)
    assert said in message and "get it again" in message


def test_long_names_are_read(tmp_path: Path) -> None:
    key = "deep/" * 40 + "é" * 100
    write_tar(tmp_path / "a.tar", {f"{key}.png": IMAGES[5], f"{key}.txt": b"x"})
    assert colours(opened(tmp_path)) == [5]


def test_a_shard_is_listed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    members = webdataset._members  # pyright: ignore[reportPrivateUsage]

    def counted(shard: Path) -> object:
        listed.append(shard.name)
        return members(shard)

    monkeypatch.setattr(webdataset, "_members", counted)
    folder = tmp_path / "shards"
    as_shards(folder, plain(4))
    assert colours(opened(folder)) == [0, 1, 2, 3]
    opened(folder)
    assert sorted(listed) == ["train-0.tar", "train-1.tar"]
    write_tar(folder / "train-1.tar", {"a.png": IMAGES[7], "a.txt": b"x"})
    assert colours(opened(folder)) == [0, 1, 7]
    assert listed[2:] == ["train-1.tar"]
    for file in (tmp_path / "home/.cache/sdx/indexes").iterdir():
        file.write_text(json.dumps([["a"]]))
    assert colours(opened(folder)) == [0, 1, 7], "what cannot be read is found out anew"


def test_a_folder_without_shards_or_samples(tmp_path: Path) -> None:
    assert "no file in it matches *.tar" in refusal(tmp_path)
    write_tar(tmp_path / "a.tar", {"a.cls": b"3"})
    assert "no image in the 1 tar files" in refusal(tmp_path)
    config = DataConfig(kind=DataKind.webdataset)
    for place in ("pipe:cat a.tar", "https://somewhere/a.tar"):
        with pytest.raises(DataError, match="no such folder"):
            open_source(replace(config, dir=place), resolution=16)
