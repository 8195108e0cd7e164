"""Which files of a folder are pictures, and what they are said to show."""

from pathlib import Path

import pytest

from sdx.data.pictures import list_pictures
from sdx.data.source import DataError

pytestmark = pytest.mark.fast


def test_captions_come_from_tables_and_text_files(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/c.webp", "deep/d.png", ".hidden.png", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": ["first", "second"]}\n'
        '{"file_name": "deep/c.webp", "text": "from above"}\n'
        '{"file_name": "gone.png", "text": "no such file"}\n'
    )
    (tmp_path / "deep" / "d.txt").write_text(" beside it \n")
    found = {
        picture.path.relative_to(tmp_path).as_posix(): picture.caption
        for picture in list_pictures(tmp_path)
    }
    assert found == {
        "a.JPG": None,
        "b.png": "first",
        "deep/c.webp": "from above",
        "deep/d.png": "beside it",
    }


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures in it"):
        list_pictures(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        list_pictures(tmp_path / "gone")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt: caption not UTF-8"):
        list_pictures(tmp_path)
