"""Grids and the loss curve."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdx.training.pictures import make_grid, plot_loss, save_png, to_uint8

pytestmark = pytest.mark.fast


def test_pixels_are_scaled_clipped_and_never_nan() -> None:
    images = np.array([-1.0, 0.0, 1.0, 1.5, -2.0, np.nan], np.float32).reshape(1, 1, 2, 3)
    assert to_uint8(images).ravel().tolist() == [0, 128, 255, 255, 0, 0]


def test_small_tiles_are_enlarged_pixel_by_pixel_in_reading_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = np.array(colours, np.uint8).reshape(3, 1, 1, 3).repeat(32, 1).repeat(32, 2)
    grid = make_grid(images, ["red", "green", "a very long caption " * 20], num_columns=2)
    tile = 192
    assert grid[12 + tile // 2, 12 + tile // 2].tolist() == [255, 0, 0]
    assert grid[12 + tile - 1, 12 + tile - 1].tolist() == [255, 0, 0]
    assert grid[12 + tile // 2, 24 + tile + tile // 2].tolist() == [0, 255, 0]
    blue = np.argwhere((grid == (0, 0, 255)).all(-1))
    assert blue[:, 1].min() == 12 and blue[:, 0].min() > 12 + tile and len(blue) == tile**2
    under = grid[12 + tile : blue[:, 0].min()]
    assert (under < 128).any(), "no caption under the tiles"
    assert (grid[-4:] == 255).all(), "the last caption runs off the sheet"


def test_large_images_keep_their_size() -> None:
    assert make_grid(np.zeros((1, 256, 300, 3), np.uint8), [""]).shape[1] == 300 + 24


def test_a_png_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "samples" / "step_000010.png"
    save_png(np.full((3, 5, 3), 7, np.uint8), path)
    assert np.asarray(Image.open(path)).shape == (3, 5, 3)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("losses", [[], [0.5], [None, None], [1.0, None, float("nan"), 0.01]])
def test_any_history_can_be_plotted(losses: list[float | None]) -> None:
    plot = plot_loss(range(1, len(losses) + 1), losses, title="a run")
    assert plot.ndim == 3 and (plot < 100).any()


def test_the_curve_is_seen() -> None:
    empty = plot_loss([], [], title="a run")
    curve = plot_loss(range(100), [1 / (1 + i) for i in range(100)], title="a run")
    assert curve.shape == empty.shape
    blue = (curve[..., 2].astype(int) - curve[..., 0]) > 80
    assert blue.sum() > 500
