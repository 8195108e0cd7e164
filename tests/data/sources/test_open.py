"""Every way to store examples gives the same examples, and refuses the same faults."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdx.config.schema import DataConfig, DataKind
from sdx.config.splits import Split
from sdx.data.shapes import ShapesSource
from sdx.data.source import BadImageError, DataError, Source
from sdx.data.sources.checked import CheckedSource
from sdx.data.sources.open import open_source
from tests.data.stored import WAYS, Stored, as_folder, as_saved, awkward, encoded, plain

pytestmark = pytest.mark.usefixtures("own_caches")
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
Way = Callable[..., DataConfig]


def opened(config: DataConfig, say: Callable[[str], None] = lambda line: None) -> Source:
    return open_source(config, resolution=16, say=say)


def colours(source: Source) -> list[int]:
    """The red of each picture of `plain`: its number."""
    return [int(source[i].pixels[0, 0, 0]) for i in range(len(source))]


@each_way
def test_the_same_pictures_and_captions_give_the_same_examples(way: Way, tmp_path: Path):
    examples = awkward()
    source = opened(way(tmp_path / "data", examples))
    reference = opened(as_folder(tmp_path / "reference", examples))
    assert len(source) == len(reference) == len(examples)
    for index, stored in enumerate(examples):
        ours, theirs = source[index], reference[index]
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        expected = tuple(text.strip() for text in stored.captions if text.strip())
        assert ours.captions == theirs.captions == expected
    assert source.fingerprint == reference.fingerprint
    assert isinstance(source, CheckedSource) and isinstance(reference, CheckedSource)
    np.testing.assert_array_equal(source.sizes, reference.sizes)
    assert source.sizes[6].tolist() == [14, 9], "as shown: turned upright"
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[5].pixels, source[5].pixels)


@each_way
def test_slices_and_splits(way: Way, tmp_path: Path):
    config = way(tmp_path / "data", plain(7))
    assert colours(opened(replace(config, split="train[:30%]"))) == [0, 1]
    rest = opened(replace(config, split="train[30%:]"))
    assert colours(rest) == [2, 3, 4, 5, 6]
    assert colours(opened(replace(config, split="train[-2:]"))) == [5, 6]
    assert rest.fingerprint != opened(config).fingerprint
    with pytest.raises(DataError, match=r"data\.split=train\[9:\]: holds none of the 7"):
        opened(replace(config, split="train[9:]"))
    if config.files is None:  # a pattern names the files of one split
        with pytest.raises(DataError, match=r"data\.split=test: .*train"):
            opened(replace(config, split="test"))


@each_way
def test_bad_images_are_left_out_and_counted_and_too_many_refused(way: Way, tmp_path: Path):
    examples = plain(6)
    examples[1] = replace(examples[1], image=examples[1].image[:-30])
    examples[3] = replace(examples[3], image=b"no image")
    examples[4] = replace(examples[4], captions=(" ",))
    config = replace(way(tmp_path / "data", examples), max_bad_fraction=0.5)
    lines: list[str] = []
    source = opened(config, lines.append)
    assert colours(source) == [0, 2, 5]
    assert isinstance(source, CheckedSource)
    reasons = [bad.reason for bad in source.bad_images]
    assert reasons == ["truncated", "not an image", "no caption"]
    assert "skipped 3 bad images: truncated × 1, not an image × 1, no caption × 1" in lines
    with pytest.raises(DataError, match=r"data\.max_bad_fraction=0\.4: 3 of 6 images") as caught:
        opened(replace(config, max_bad_fraction=0.4))
    assert len(caught.value.bad_images) == 3
    with pytest.raises(DataError, match="over-large × 4"):
        opened(replace(config, max_pixels=47))


@each_way
def test_the_check_is_remembered(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sdx.data.sources import checked

    decoded: list[int] = []

    def counted(file: bytes, *, max_pixels: int) -> Image.Image:
        decoded.append(len(file))
        return decode(file, max_pixels=max_pixels)

    decode = checked.decode
    monkeypatch.setattr(checked, "decode", counted)
    config = way(tmp_path / "data", plain(5))
    part, whole = replace(config, split="train[:2]"), config
    numbers = []
    for wanted in (part, part, whole, part, whole):
        decoded.clear()
        opened(wanted)
        numbers.append(len(decoded))
    assert numbers == [2, 0, 3, 0, 0]


def test_the_examples_decide_the_fingerprint(tmp_path: Path):
    first = opened(as_folder(tmp_path / "a", plain(3)))
    changed = plain(3)
    changed[1] = replace(changed[1], captions=("other",))
    assert opened(as_folder(tmp_path / "b", changed)).fingerprint != first.fingerprint
    changed = plain(3)
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    for name, image in (("c", pixels), ("d", pixels[::-1])):
        content = encoded(Image.fromarray(image), compress_level=0)
        as_folder(tmp_path / name, [Stored("a.png", content, ("x",))])
    configs = [DataConfig(kind=DataKind.imagefolder, dir=str(tmp_path / n)) for n in ("c", "d")]
    assert len({opened(config).fingerprint for config in configs}) == 2, "as many bytes each"
    assert opened(as_folder(tmp_path / "e", plain(3)[::-1])).fingerprint == first.fingerprint
    assert opened(as_saved(tmp_path / "f", plain(3)[::-1])).fingerprint != first.fingerprint


@pytest.mark.fast
def test_sources_that_are_drawn_are_sliced_too():
    config = DataConfig(kind=DataKind.shapes, num_examples=10)
    source = opened(config)
    assert isinstance(source, ShapesSource) and len(source) == 10
    part = opened(replace(config, split="train[60%:]"))
    assert len(part) == 4 and part.fingerprint != source.fingerprint
    np.testing.assert_array_equal(part[1].pixels, source[7].pixels)
    with pytest.raises(IndexError):
        part[4]
    with pytest.raises(DataError, match="holds no example"):
        opened(replace(config, split="train[20:]"))
    with pytest.raises(DataError, match="data=shapes has train and validation"):
        opened(replace(config, split="test"))


def test_an_image_that_vanishes_is_bad_late(tmp_path: Path):
    config = WAYS["tar"](tmp_path / "data", plain(4))
    source = opened(config)
    (tmp_path / "data/train-1.tar").unlink()
    assert colours(opened(replace(config, split="train[:2]"))) == [0, 1]
    with pytest.raises(BadImageError) as caught:
        source[3]
    assert (caught.value.reason, caught.value.path) == ("missing", "train-1.tar/deep/003")


@pytest.mark.fast
def test_a_split_that_is_no_split(tmp_path: Path):
    config = DataConfig(kind=DataKind.imagefolder, dir=str(tmp_path), split="train[")
    with pytest.raises(DataError, match=r"data\.split=train\[: a slice must be"):
        opened(config)
    assert Split("train").rows(2) == range(2)
