"""Which folders an export may take, and that it takes them whole."""

import errno
from pathlib import Path

import pytest

from sdx.weights.export import ExportError
from sdx.weights.export_folder import check_replaceable, export_folder, exported

pytestmark = pytest.mark.fast


def write(folder: Path, text: str, of: str = "this") -> None:
    with export_folder(folder, {"of": of, "step": 4}) as draft:
        (draft / "unet").mkdir()
        (draft / "unet" / text).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_new_an_empty_and_ones_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    write(folder, "first")
    assert exported(folder) == {"of": "this", "step": 4, "files": ["unet/first"]}
    write(folder, "second")
    assert names(folder) == ["sdx.json", "unet/second"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "first")
    assert names(tmp_path) == [
        "deep/out/sdx.json", "deep/out/unet/second", "empty/sdx.json", "empty/unet/first",
    ]  # fmt: skip


def test_what_is_someone_elses_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "mine", "first")
    (tmp_path / "mine" / "unet" / "notes.txt").write_text("keep me")
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.png").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    write(tmp_path / "other", "first", of="that")
    before = names(tmp_path)
    for name, reason in (
        ("mine", r"did not export \(unet/notes.txt\)"),
        ("photographs", r"did not export \(a.png\)"),
        ("file", "is a file"),
        ("other", "an export of that, not of this"),
    ):
        with pytest.raises(ExportError, match=reason):
            write(tmp_path / name, "second")
    assert names(tmp_path) == before


def test_a_damaged_record_makes_all_foreign(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    (tmp_path / "out" / "sdx.json").write_text("{")
    with pytest.raises(ExportError, match="unet/first"):
        check_replaceable(tmp_path / "out", "this")


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(KeyError), export_folder(tmp_path / "out", {"of": "this"}) as draft:
        (draft / "half").write_text("half")
        raise KeyError
    assert names(tmp_path) == ["out/sdx.json", "out/unet/first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write(tmp_path / "link", "first")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "there") == ["sdx.json", "unet/first"]


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path) -> None:
    """Of a write that fails the system names no file."""
    with pytest.raises(OSError, match=r"No space left on device: '.*out'"):
        with export_folder(tmp_path / "out", {"of": "run"}):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
