"""A folder of drawn pictures is gone on with, and each picture is a function of its number."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdx.data.pictures import list_pictures
from sdx.data.source import DataError
from sdx.experiment.evaluation.picture_sets import (
    DrawingSettings,
    check_folder,
    draw_missing,
    drawing_record,
    read_prompts,
)

pytestmark = pytest.mark.fast
SETTINGS = DrawingSettings(5, 3.0, 0.0, "grey", "ddpm", "float32", seed=7)
PROMPTS = [f"picture {n}" for n in range(7)]
SIDE = 4


class Drawing:
    """A pipeline whose pictures are their noise, and that may be killed in some batch."""

    latent_shape = (SIDE, SIDE, 3)
    model = SimpleNamespace(vae=SimpleNamespace(factor=1))

    def __init__(self, batch_size: int, batches: int = 100):
        self.batch_size, self.batches = batch_size, batches
        self.asked: list[str] = []

    def sample(self, prompts: list[str], **options: Any) -> np.ndarray:
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.asked += prompts
        assert len(prompts) == len(options["keys"]) == self.batch_size
        assert options["negative_prompts"] == ["grey"] and options["sampler"] == "ddpm"
        return np.clip(options["latents"] / 4 + options["keys"][:, :1, None, None] % 2, -1, 1)


def draw(folder: Path, pipeline: Any, settings: DrawingSettings = SETTINGS) -> None:
    record = drawing_record({"source": "toy"}, pipeline, settings, PROMPTS)
    check_folder(folder, record)
    draw_missing(pipeline, PROMPTS, folder, settings, record, say=lambda text: None)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_an_interrupted_drawing_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    draw(tmp_path / "whole", Drawing(batch_size=7))
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "cut", Drawing(batch_size=2, batches=2))
    assert len(pixels(tmp_path / "cut")) == 4
    (tmp_path / "cut" / "000001.png").unlink()
    rest = Drawing(batch_size=3)
    draw(tmp_path / "cut", rest)
    assert rest.asked == [PROMPTS[n] for n in (1, 4, 5, 6, 6, 6)]
    whole, cut = pixels(tmp_path / "whole"), pixels(tmp_path / "cut")
    assert whole.keys() == cut.keys() and len(whole) == 7
    for name, image in whole.items():
        np.testing.assert_array_equal(image, cut[name])
    assert len({image.tobytes() for image in whole.values()}) == 7
    assert [picture.caption for picture in list_pictures(tmp_path / "cut")] == PROMPTS


def test_pictures_drawn_in_another_way_are_not_mixed(tmp_path: Path) -> None:
    draw(tmp_path / "out", Drawing(batch_size=7))
    with pytest.raises(DataError, match=r"settings.seed 7 → 8.*use another --out"):
        draw(tmp_path / "out", Drawing(batch_size=7), replace(SETTINGS, seed=8))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        draw(tmp_path / "other", Drawing(batch_size=7))


def _as_lines(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  two words  \n")
    return path


def _as_captions(folder: Path) -> Path:
    rows = [
        {"file_name": f"{n}.png", "text": t} for n, t in enumerate(["a red circle", "two words"])
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        (folder / row["file_name"]).touch()
    return folder


@pytest.mark.parametrize("write", [_as_lines, _as_captions])
def test_prompts_are_lines_or_captions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert read_prompts(write(tmp_path)) == ["a red circle", "two words"]


def test_missing_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="1 of 1 pictures have no caption"):
        read_prompts(tmp_path)
