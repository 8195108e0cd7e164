"""Every example of docs/your_own_dataset.md does what the text around it says."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdx.config.compose import compose
from sdx.data.source import Source
from sdx.data.sources.open import open_source

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def text(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The document; the folder of photographs that it speaks of is the working folder's."""
    text = (repository / "docs/your_own_dataset.md").read_text()
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    for folder in ("photos", "tables", "shards", "records"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(("0001.jpg", "0002.png")):
        Image.new("RGB", (8, 6), (200, 99 * number, 0)).save(photos / name)
    rows = re.findall(r'^ +(\{"file_name".*)$', text, re.MULTILINE)
    assert len(rows) == 2
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    return text


def commands(text: str) -> list[list[str]]:
    """Overrides of each training command that names a folder of the examples."""
    found = re.findall(r"python -m sdx\.train ((?:model=\S+ )?data=\w+ data\.dir=\w+)", text)
    return [line.split() for line in found]


def opened(overrides: list[str]) -> Source:
    data = compose([o for o in overrides if not o.startswith("model=")]).data
    return open_source(data, resolution=16, say=lambda line: None)


def test_every_way_is_made_and_read(text: str) -> None:
    *blocks, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)  # the last is a source's code
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/your_own_dataset.md", "exec"), {})  # as its reader would
    sources = {overrides[-1]: opened(overrides) for overrides in commands(text)}
    folders = ("photos", "tables", "saved", "shards", "records")
    assert set(sources) == {f"data.dir={folder}" for folder in folders}
    captions = {place: source[0].captions for place, source in sources.items()}
    assert captions["data.dir=shards"] == ("a caption", "another")
    assert captions["data.dir=records"] == ("a red kite",)
    alike = [sources[f"data.dir={folder}"].fingerprint for folder in folders[:3]]
    assert len(set(alike)) == 1


def test_the_source_of_ones_own_is_one(text: str) -> None:
    block = re.findall(r"```python\n(# stripes.*?)```", text, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(compile(block, "docs/your_own_dataset.md", "exec"), names)
    source = names["open_stripes"]({"length": 3}, split="train", resolution=8)
    assert isinstance(source, Source)
    assert source[1].captions == ("stripes from line 1",) and source[1].pixels.shape == (8, 8, 3)
