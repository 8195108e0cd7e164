"""Folders of images: every layout of captions, and what becomes of everything that can be wrong."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdx.config.splits import Split
from sdx.data.source import BadImageError, DataError
from sdx.data.sources.checked import CheckedSource
from sdx.data.sources.imagefolder import ImageFolderRecords

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    return path


def add(path: Path, caption: str | None = None, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def row(file_name: object, text: object = "a caption") -> dict[str, object]:
    return {"file_name": file_name, "text": text}


def opened(
    folder: Path,
    *,
    split: str = "train",
    caption_column: str = "text",
    max_bad_fraction: float = 0.0,
    max_pixels: int = 10_000,
    say: Callable[[str], None] = lambda line: None,
    scan_cache: Path | None = None,
) -> CheckedSource:
    return CheckedSource(
        ImageFolderRecords(folder, split=split, caption_column=caption_column),
        Split(split),
        max_bad_fraction=max_bad_fraction,
        max_pixels=max_pixels,
        say=say,
        scan_cache=scan_cache,
    )


def captions(source: CheckedSource) -> list[tuple[str, ...]]:
    return [source[i].captions for i in range(len(source))]


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, **options)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def bad(folder: Path, **options: object) -> dict[str, str]:
    """Path and reason of each image left out."""
    source = opened(folder, max_bad_fraction=1.0, **options)  # pyright: ignore[reportArgumentType]
    return {image.path: image.reason for image in source.bad_images}


def test_captions_in_text_files_of_nested_folders_and_all_formats(folder: Path):
    add(folder / "b.JPG", "two ")
    add(folder / "a.png", "one")
    add(folder / "deep/er/c.webp", "\ufeffdrei Füße\n")
    add(folder / ".hidden.png")
    (folder / "notes.md").write_text("not an image, and does not look like one")
    source = opened(folder)
    assert captions(source) == [("one",), ("two",), ("drei Füße",)]
    assert source.bad_images == []
    np.testing.assert_array_equal(source[0].pixels, np.full((6, 8, 3), (255, 0, 0), np.uint8))


def test_captions_in_jsonl(folder: Path):
    add(folder / "a.png")
    add(folder / "sub/b.png")
    add(folder / "c.png", "beside it")
    write_jsonl(
        folder / "metadata.jsonl",
        {"file_name": "sub/b.png", "text": ["first", "second"], "extra": 1},
        {"file_name": "a.png", "text": "one"},
    )
    assert captions(opened(folder)) == [("one",), ("beside it",), ("first", "second")]


def test_captions_in_csv(folder: Path):
    for name in ("a", "b", "c"):
        add(folder / f"{name}.png")
    (folder / "metadata.csv").write_text(
        '\ufefffile_name,about\nb.png,"two, and\nmore"\r\na.png,"say ""hi"""\nc.png,up\u2028down\n',
        encoding="utf-8",
    )
    assert captions(opened(folder, caption_column="about")) == [
        ('say "hi"',),
        ("two, and\nmore",),
        ("up\u2028down",),
    ]


def test_a_table_lies_where_its_images_are(folder: Path):
    add(folder / "one/a.png")
    add(folder / "two/a.png")
    write_jsonl(folder / "one/metadata.jsonl", row("a.png", "first"))
    (folder / "two/metadata.csv").write_text("file_name,text\na.png,second\n")
    assert captions(opened(folder)) == [("first",), ("second",)]


def test_splits_are_folders(folder: Path):
    add(folder / "train/a.png", "train")
    add(folder / "validation/a.png", "validation")
    add(folder / "stray.png", "stray")
    assert captions(opened(folder)) == [("train",)]
    assert captions(opened(folder, split="validation")) == [("validation",)]
    assert "has no such folder, it has train, validation" in refusal(folder, split="test")
    for split in ("../photos", "", ".."):
        assert "must be the name of a folder" in refusal(folder, split=split)


def test_one_table_above_the_splits(folder: Path):
    add(folder / "train/a.png")
    add(folder / "test/a.png")
    write_jsonl(folder / "metadata.jsonl", row("train/a.png", "train"), row("test/a.png", "test"))
    assert captions(opened(folder)) == [("train",)]
    assert captions(opened(folder, split="test")) == [("test",)]


def test_missing_folder_has_four_parts(folder: Path):
    message = refusal(folder / "absent")
    assert message.startswith(f"data.dir={folder}/absent: no such folder, must be the folder")
    assert "give its path" in message
    assert "a file, must be the folder" in refusal(add(folder / "a.png"))


def test_empty_folder(folder: Path):
    assert f"no images in {folder}; put JPEG" in refusal(folder)


def test_bad_images_are_left_out_counted_and_listed(folder: Path):
    for i in range(4):
        add(folder / f"good{i}.png", f"number {i}")
    whole = add(folder / "truncated.png", "x").read_bytes()
    (folder / "truncated.png").write_bytes(whole[:-30])
    (folder / "truncated2.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (folder / "truncated2.txt").write_text("x")
    add(folder / "empty.png", "x").write_bytes(b"")
    add(folder / "page.jpg", "x").write_text("<html>404</html>")
    add(folder / "moving.gif", "x")
    Image.new("RGB", (200, 100)).save(add(folder / "large.png", "x"))
    lines: list[str] = []
    source = opened(folder, max_bad_fraction=0.6, say=lines.append)
    assert captions(source) == [(f"number {i}",) for i in range(4)]
    assert {image.path: image.reason for image in source.bad_images} == {
        "empty.png": "empty",
        "large.png": "over-large",
        "moving.gif": "not an image",
        "page.jpg": "not an image",
        "truncated.png": "truncated",
        "truncated2.jpg": "truncated",
    }
    assert lines[-1] == (
        "skipped 6 bad images: not an image × 2, truncated × 2, empty × 1, over-large × 1"
    )


def test_too_many_bad_images_stop_the_run(folder: Path):
    for i in range(3):
        add(folder / f"good{i}.png", "x")
    add(folder / "empty.png", "x").write_bytes(b"")
    assert len(opened(folder, max_bad_fraction=0.25)) == 3
    with pytest.raises(DataError) as caught:
        opened(folder, max_bad_fraction=0.249)
    message = str(caught.value)
    assert message.startswith("data.max_bad_fraction=0.249: 1 of 4 images of")
    assert "(empty × 1)" in message and "raise the limit to 0.25 " in message
    assert "  empty.png: empty (0 bytes)" in message
    assert [image.path for image in caught.value.bad_images] == ["empty.png"]


@pytest.mark.parametrize("num_bad, limit", [(1, 0.143), (2, 0.29), (4, 0.58)])
def test_the_limit_that_is_advised_lets_the_run_start(folder: Path, num_bad: int, limit: float):
    for i in range(7):
        path = add(folder / f"{i}.png", "x")
        if i < num_bad:
            path.write_bytes(b"")
    match = re.search(r"raise the limit to (\S+) ", refusal(folder))
    assert match is not None
    advised = float(match[1])
    assert advised <= limit
    assert len(opened(folder, max_bad_fraction=advised)) == 7 - num_bad


def test_a_folder_of_bad_images_only_is_refused_at_any_limit(folder: Path):
    add(folder / "a.png", "x").write_bytes(b"")
    assert "1 of 1 images" in refusal(folder, max_bad_fraction=1.0)


def test_images_without_a_caption(folder: Path):
    add(folder / "good.png", "x")
    add(folder / "none.png")
    add(folder / "blank.png", " \n")
    (add(folder / "latin.png").with_suffix(".txt")).write_bytes("Füße".encode("latin-1"))
    assert bad(folder) == {
        "none.png": "no caption",
        "blank.png": "no caption",
        "latin.png": "caption not UTF-8",
    }


def test_blank_cells_and_files_that_are_not_there(folder: Path):
    for name in ("a", "b", "c", "d", "e"):
        add(folder / f"{name}.png")
    write_jsonl(
        folder / "metadata.jsonl",
        row("a.png", ["", "one", "  "]),
        row("b.png", None),
        row("c.png", ""),
        row("d.png", []),
        {"file_name": "e.png"},
        row("gone.png"),
    )
    expected = dict.fromkeys(["b.png", "c.png", "d.png", "e.png"], "no caption")
    assert bad(folder) == expected | {"gone.png": "missing"}
    assert captions(opened(folder, max_bad_fraction=1.0)) == [("one",)]


@pytest.mark.parametrize(
    "name, said",
    [
        ("/etc/passwd", "is absolute"),
        ("C:\\photos\\a.png", "is absolute"),
        ("\\\\server\\a.png", "is absolute"),
        ("../photos/a.png", "has '..' in it"),
        ("sub\\..\\..\\a.png", "has '..' in it"),
        ("a.png\0.jpg", "holds a NUL character"),
        ("", "must be the name of an image"),
        (7, "must be the name of an image"),
        (None, "must be the name of an image"),
    ],
)
def test_names_that_leave_the_folder_stop_the_run(folder: Path, name: object, said: str):
    add(folder / "a.png")
    write_jsonl(folder / "metadata.jsonl", row("a.png"), row(name))
    message = refusal(folder, max_bad_fraction=1.0)
    assert message.startswith(f"{folder}/metadata.jsonl:2: ") and said in message


@pytest.mark.parametrize(
    "kind", ["image", "caption", "folder", "table", "table above", "listed", "split"]
)
def test_links_out_of_the_folder_stop_the_run(folder: Path, kind: str):
    outside = folder.parent / "outside"
    add(outside / "secret.png", "secret")
    write_jsonl(outside / "metadata.jsonl", row("a.png"))
    add(folder / "a.png", None if kind == "caption" else "x")
    link, target = {
        "image": ("b.png", "secret.png"),
        "caption": ("a.txt", "secret.txt"),
        "folder": ("sub", "."),
        "table": ("metadata.jsonl", "metadata.jsonl"),
        "table above": ("metadata.jsonl", "metadata.jsonl"),
        "listed": (".b", "."),
        "split": ("train", "."),
    }[kind]
    (folder / link).symlink_to(outside / target)
    if kind == "table above":
        add(folder / "train/a.png", "x")
    if kind == "listed":
        write_jsonl(folder / "metadata.jsonl", row(".b/secret.png"))
    assert "a link that leads out of data.dir" in refusal(folder, max_bad_fraction=1.0)


def test_links_within_the_folder_and_to_the_folder_are_fine(folder: Path, tmp_path: Path):
    add(folder / "a.png", "one")
    (folder / "b.png").symlink_to("a.png")
    (folder / "b.txt").symlink_to("a.txt")
    (tmp_path / "link").symlink_to(folder)
    assert captions(opened(tmp_path / "link")) == [("one",), ("one",)]


def test_a_pipe_a_loop_of_links_and_a_long_name_are_bad_images(folder: Path):
    add(folder / "good.png", "x")
    (folder / "pipe.txt").write_text("x")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    long = "x" * 5000 + ".png"
    write_jsonl(folder / "metadata.jsonl", row("loop.png"), row(long), row("good.png/a.png"))
    names = ["pipe.png", "loop.png", long, "good.png/a.png"]
    assert bad(folder) == dict.fromkeys(names, "unreadable")


def test_faults_of_a_jsonl_table_are_named_by_line(folder: Path):
    add(folder / "a.png")
    table = folder / "metadata.jsonl"
    good = json.dumps(row("a.png")).encode()
    table.write_bytes(b"\n".join([good, b"", b"{", b"[1]", b'{"text": "\xff"}', b"[" * 99999]))
    message = refusal(folder)
    for line, said in {3: "not a JSON object", 4: "a JSON list", 5: "not UTF-8", 6: "not"}.items():
        assert f"metadata.jsonl:{line}: {said}" in message
    table.write_bytes(b"\n".join([good] + [b"?"] * 9))
    assert refusal(folder).endswith("and 4 more.")


@pytest.mark.parametrize(
    "text, said",
    [
        ("file_name,text\na.png,ok\nb.png,one,two\n", "metadata.csv:3: not a CSV row (more cells"),
        ('file_name,text\na.png,"open\n', "metadata.csv:2: not a CSV row"),
        ("file_name,text\na.png,F\udcfcße\n", "metadata.csv:2: not UTF-8"),
        ("file_name,text\n", "metadata.csv: holds no rows"),
        ("", "metadata.csv: holds no rows"),
        ("image,text\na.png,x\n", "no column 'file_name'; its columns are 'image', 'text'"),
    ],
)
def test_faults_of_a_csv_table(folder: Path, text: str, said: str):
    add(folder / "a.png")
    (folder / "metadata.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert said in refusal(folder)


def test_a_missing_caption_column_lists_those_there_are(folder: Path):
    add(folder / "a.png")
    write_jsonl(folder / "metadata.jsonl", {"file_name": "a.png", "caption": "x", "tags": 1})
    message = refusal(folder)
    assert message.startswith("data.caption_column=text: ")
    assert "its columns are 'file_name', 'caption', 'tags'" in message
    write_jsonl(folder / "metadata.jsonl", {"file_name": "a.png", "caption": "x"})
    assert refusal(folder).endswith("Set data.caption_column=caption.")


@pytest.mark.parametrize("value", [1, {"a": "b"}, ["x", 1], [["x"]], True])
def test_captions_that_are_no_text(folder: Path, value: object):
    add(folder / "a.png")
    write_jsonl(folder / "metadata.jsonl", row("a.png", value))
    assert "metadata.jsonl:1: text is a" in refusal(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud800"}')
    assert "half a surrogate pair" in refusal(folder)


def test_an_image_listed_twice_stops_the_run(folder: Path):
    add(folder / "a.png")
    write_jsonl(folder / "metadata.jsonl", row("a.png"), row("./a.png"))
    assert "metadata.jsonl:2: './a.png' is listed before, in line 1" in refusal(folder)
    write_jsonl(folder / "metadata.jsonl", row("a.png"))
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert "is listed before, in" in refusal(folder)


def test_names_that_are_not_utf_8(folder: Path):
    add(folder / "good.png", "x")
    shutil.copy(folder / "good.png", folder / os.fsdecode(b"\xff.png"))
    assert bad(folder) == {"\\udcff.png": "name not UTF-8"}


def test_fingerprint_follows_content(folder: Path):
    add(folder / "a.png", "one")
    first = opened(folder).fingerprint
    assert opened(folder).fingerprint == first
    (folder / "a.txt").write_text("two")
    second = opened(folder).fingerprint
    add(folder / "b.png", "three")
    third = opened(folder).fingerprint
    Image.effect_noise((64, 64), 99).save(folder / "b.png")
    fourth = opened(folder).fingerprint
    assert len({first, second, third, fourth}) == 4
    (folder / "b.png").rename(folder / "c.png")
    (folder / "b.txt").rename(folder / "c.txt")
    assert opened(folder).fingerprint == fourth, "the examples are what they were"
    (folder / "c.png").rename(folder / "0.png")
    (folder / "c.txt").rename(folder / "0.txt")
    assert opened(folder).fingerprint != fourth, "they come in another order"
    shutil.copytree(folder, folder.parent / "copy")
    assert opened(folder.parent / "copy").fingerprint == opened(folder).fingerprint


def test_an_image_that_vanishes_is_bad_late(folder: Path):
    path = add(folder / "sub/a.png", "one")
    source = opened(folder)
    path.unlink()
    with pytest.raises(BadImageError) as caught:
        source[0]
    assert (caught.value.reason, caught.value.path) == ("missing", "sub/a.png")


def test_the_check_is_remembered_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decoded: list[str] = []
    image = ImageFolderRecords.image

    def read(self: ImageFolderRecords, index: int) -> bytes:
        decoded.append(self.name(index))
        return image(self, index)

    monkeypatch.setattr(ImageFolderRecords, "image", read)
    cache = tmp_path / "cache"

    def check(max_pixels: int = 10_000) -> tuple[list[str], list[str]]:
        decoded.clear()
        source = opened(folder, max_bad_fraction=1.0, scan_cache=cache, max_pixels=max_pixels)
        return sorted(decoded), [image.reason for image in source.bad_images]

    for name in ("a", "b", "c"):
        add(folder / f"{name}.png", name)
    (folder / "c.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(add(folder / "tiny.png", "d"))
    assert check() == (["a.png", "b.png", "c.png", "tiny.png"], ["empty"])
    assert check() == (["c.png"], ["empty"]), "good ones are known, bad ones are tried again"
    assert check(max_pixels=47) == (["c.png"], ["over-large", "over-large", "empty"])
    check()
    add(folder / "c.png")
    (folder / "a.png").write_bytes(b"?" * (folder / "a.png").stat().st_size)
    assert check() == (["a.png", "c.png"], ["not an image"])
    next(cache.iterdir()).write_text("damaged")
    assert check() == (["a.png", "b.png", "c.png", "tiny.png"], ["not an image"])


def test_a_cache_that_cannot_be_written_is_said(folder: Path):
    add(folder / "a.png", "one")
    lines: list[str] = []
    opened(folder, scan_cache=add(folder.parent / "file.png") / "cache", say=lines.append)
    assert "not remembered" in lines[-1]


def test_photographs_of_scikit_image(folder: Path):
    """Real files: gray, RGB, RGBA, palette; PNG and JPEG."""
    skimage = pytest.importorskip("skimage")
    photos = Path(skimage.__file__).parent / "data"
    names = [path for path in photos.iterdir() if path.suffix in (".png", ".jpg")]
    for path in names:
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(f"a photo of {path.stem}")
    source = opened(folder, max_pixels=40_000_000)
    assert len(source) == len(names) > 10
    for i in range(len(source)):
        example = source[i]
        assert example.pixels.ndim == 3 and example.pixels.std() > 1
        assert example.captions[0].startswith("a photo of ")
