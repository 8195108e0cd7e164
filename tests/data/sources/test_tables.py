"""Columns of tables: which are missing, which could be meant, and what their cells may hold."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdx.config.schema import DataConfig, DataKind
from sdx.data.source import DataError, Source
from sdx.data.sources.checked import CheckedSource
from sdx.data.sources.open import open_source
from tests.data.sources.test_open import colours
from tests.data.stored import as_parquet, encoded, plain

pytestmark = pytest.mark.usefixtures("own_caches")

IMAGES = [example.image for example in plain(3)]


def write(folder: Path, columns: dict[str, Any], name: str = "train.parquet") -> DataConfig:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return DataConfig(kind=DataKind.parquet, dir=str(folder), max_bad_fraction=1.0)


def opened(config: DataConfig) -> Source:
    return open_source(config, resolution=16, say=lambda line: None)


def refusal(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        opened(config)
    return str(caught.value)


def test_missing_columns_list_those_there_are(tmp_path: Path) -> None:
    columns = {"img": IMAGES, "caption": ["a", "b", "c"], "alt": ["x"] * 3, "id": [1, 2, 3]}
    config = write(tmp_path / "data", columns)
    message = refusal(config)
    assert "data.image_column=image: there is no such column; set data.image_column=img" in message
    assert "data.caption_column=text: there is no such column" in message
    assert "set data.caption_column=caption or alt" in message
    assert message.endswith("are img (image), caption (text), alt (text), id (int64).")
    found = replace(config, image_column="img", caption_column="caption")
    assert colours(opened(found)) == [0, 1, 2]
    wrong = refusal(replace(found, image_column="id"))
    assert wrong.startswith("data.image_column=id: holds no images; set data.image_column=img.")


def test_addresses_are_no_images(tmp_path: Path) -> None:
    config = write(tmp_path / "data", {"image": ["https://somewhere/a.png"], "text": ["a"]})
    assert "data.image_column=image: holds no images; no column holds images" in refusal(config)


def test_a_path_in_a_cell_names_a_file_beside_the_table_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(IMAGES[2])
    (tmp_path / "secret.png").write_bytes(IMAGES[1])
    paths = ["a.png", str(tmp_path / "secret.png"), "../secret.png", "absent.png", None]
    cells = [{"bytes": None, "path": path} for path in paths]
    source = opened(write(folder, {"image": cells, "text": ["x"] * len(cells)}))
    assert colours(source) == [2]
    assert isinstance(source, CheckedSource)
    assert [bad.path for bad in source.bad_images] == ["row 1", "row 2", "row 3", "row 4"]
    assert [bad.reason for bad in source.bad_images] == ["missing"] * 4


def test_a_changed_image_beside_the_table_is_other_content(tmp_path: Path) -> None:
    """Else a cache of the old one would be taken for that of the new one."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(IMAGES[0])
    cells = [{"bytes": IMAGES[1], "path": "b.png"}, {"bytes": None, "path": "a.png"}]
    config = write(folder, {"image": cells, "text": ["x", "y"]})
    before = opened(config)
    assert colours(before) == [1, 0]
    (folder / "a.png").write_bytes(encoded(Image.new("RGB", (20, 30), (2, 4, 253))))
    after = opened(config)
    assert isinstance(after, CheckedSource) and after.sizes.tolist() == [[6, 8], [30, 20]]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("content", [pa.string(), pa.int64()])
def test_bytes_that_are_none_name_no_file(tmp_path: Path, content: pa.DataType) -> None:
    """Pillow would open a text as a file's name, and a number as one that is open."""
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    value = str(tmp_path / "secret.png") if content == pa.string() else 3
    image = pa.StructArray.from_arrays(
        [pa.array([value], content), pa.array(["x"])], ["bytes", "path"]
    )
    message = refusal(write(tmp_path / "data", {"image": image, "text": ["a"]}))
    assert "data.image_column=image: holds no images" in message


def test_hostile_paths_are_bad_images(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "folder").mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    paths = ["folder", "loop", "out", "pipe", "a\0b", "", "x" * 300]
    cells = [{"bytes": IMAGES[0], "path": "x"}, *({"bytes": None, "path": p} for p in paths)]
    source = opened(write(folder, {"image": cells, "text": ["x"] * len(cells)}))
    assert isinstance(source, CheckedSource) and colours(source) == [0]
    assert len(source.bad_images) == len(paths)


def test_rows_without_image_or_caption_are_bad(tmp_path: Path) -> None:
    cells = {"image": [IMAGES[0], None, IMAGES[2]], "text": ["a", "b", None]}
    source = opened(write(tmp_path / "data", cells))
    assert colours(source) == [0]
    assert isinstance(source, CheckedSource)
    assert [bad.reason for bad in source.bad_images] == ["missing", "no caption"]


def test_files_are_chosen_by_pattern_and_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    as_parquet(folder / "a", plain(2))
    as_parquet(folder / "b", plain(3), split="validation")
    config = DataConfig(kind=DataKind.parquet, dir=str(folder))
    assert len(opened(config)) == 2
    assert len(opened(replace(config, split="validation"))) == 3
    assert refusal(replace(config, split="test")).startswith(
        f"data.split=test: no file of {folder} is of that split; there are train, validation."
    )
    assert "no file in it matches data.files=c/*" in refusal(replace(config, files="c/*"))
    assert len(opened(replace(config, files="a/*"))) == 2


def test_a_changed_table_is_read_anew(tmp_path: Path) -> None:
    config = write(tmp_path / "data", {"image": IMAGES[:2], "text": ["a", "b"]})
    first = opened(config)
    write(tmp_path / "data", {"image": IMAGES[1:], "text": ["a", "b"]})
    assert colours(opened(config)) == [1, 2]
    assert opened(config).fingerprint != first.fingerprint


def test_damaged_files_and_mixed_formats_are_refused(tmp_path: Path) -> None:
    config = write(tmp_path / "data", {"image": IMAGES, "text": ["a", "b", "c"]})
    file = tmp_path / "data/train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert "its parquet files cannot be read" in refusal(config)
    (tmp_path / "data/train.arrow").write_bytes(b"")
    assert "holds parquet and arrow files of one split" in refusal(config)
