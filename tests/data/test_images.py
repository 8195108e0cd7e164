"""Pixels are those a viewer shows; sizes, crops and filters are those of diffusers' script."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdx.config.schema import Interpolation
from sdx.data.images import FILTERS, center_offsets, covering_size, decode, training_image
from sdx.data.source import BadImageError

MAX_PIXELS = 1_000_000
pytestmark = pytest.mark.fast

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> np.ndarray:
    """4 × 6 pixels: red, green over blue, white blocks, so every rotation and flip differs."""
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2, :3], image[:2, 3:], image[2:, :3], image[2:, 3:] = RED, GREEN, BLUE, WHITE
    return image


def saved(path: Path, image: Image.Image, **options: Any) -> np.ndarray:
    image.save(path, **options)
    return pixels(path)


def pixels(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    image = decode(path, max_pixels=max_pixels)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(path: Path, header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG written chunk by chunk, for what Pillow does not write."""
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def reason(path: Path, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImageError) as caught:
        decode(path, max_pixels=max_pixels)
    assert caught.value.detail
    return caught.value.reason


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_rgb_is_kept_in_lossless_formats(tmp_path: Path):
    for name, options in {"a.png": {}, "a.webp": {"lossless": True}}.items():
        np.testing.assert_array_equal(
            saved(tmp_path / name, Image.fromarray(corners()), **options), corners()
        )


def test_gray_palette_and_one_bit(tmp_path: Path):
    gray = np.array([[0, 77], [128, 255]], np.uint8)
    expected = np.repeat(gray[..., None], 3, 2)
    np.testing.assert_array_equal(saved(tmp_path / "l.png", Image.fromarray(gray)), expected)
    palette = Image.fromarray(corners()).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(saved(tmp_path / "p.png", palette), corners())
    one_bit = saved(
        tmp_path / "1.png", Image.fromarray(gray).convert("1", dither=Image.Dither.NONE)
    )
    np.testing.assert_array_equal(one_bit[..., 0], [[0, 0], [255, 255]])


def test_transparent_pixels_lie_over_white(tmp_path: Path):
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [255, 0, 0, 102]]], np.uint8)
    over_white = [[WHITE, RED, (255, 153, 153)]]
    np.testing.assert_array_equal(saved(tmp_path / "a.png", Image.fromarray(rgba)), over_white)
    webp = saved(tmp_path / "a.webp", Image.fromarray(rgba), lossless=True, exact=True)
    np.testing.assert_array_equal(webp, over_white)
    la = Image.fromarray(np.array([[[0, 0], [0, 255], [0, 102]]], np.uint8), "LA")
    np.testing.assert_array_equal(saved(tmp_path / "la.png", la)[0, :, 0], [255, 0, 153])


def test_transparency_of_palettes_and_of_one_colour(tmp_path: Path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.putdata([0, 1, 2])
    one = saved(tmp_path / "p.png", palette, transparency=1)
    np.testing.assert_array_equal(one, [[RED, WHITE, BLUE]])
    alphas = saved(tmp_path / "pa.png", palette, transparency=bytes([0, 255, 102]))
    np.testing.assert_array_equal(alphas, [[WHITE, GREEN, (153, 153, 255)]])
    rgb = saved(tmp_path / "rgb.png", Image.fromarray(corners()), transparency=GREEN)
    expected = corners()
    expected[:2, 3:] = WHITE
    np.testing.assert_array_equal(rgb, expected)


def test_16_bit_is_scaled_not_clipped(tmp_path: Path):
    levels = np.array([[0, 128, 257, 32768, 65407, 65535]], np.uint16)
    gray = saved(tmp_path / "i16.png", Image.fromarray(levels))
    np.testing.assert_array_equal(gray[0, :, 0], [0, 0, 1, 128, 255, 255])
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    keyed = png(tmp_path / "key.png", header, b"\0\x12\x34\x80\x00", (b"tRNS", b"\x12\x34"))
    np.testing.assert_array_equal(pixels(keyed, 9)[0, :, 0], [255, 128])
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    rgb = png(tmp_path / "rgb16.png", header, b"\0\xff\xff\x80\x00\x00\x00")
    np.testing.assert_array_equal(pixels(rgb, 9), [[[255, 128, 0]]])


def test_cmyk_jpegs_are_read_in_adobes_polarity(tmp_path: Path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    path = tmp_path / "cmyk.jpg"
    shown = saved(path, red, quality=95)
    assert b"Adobe" in path.read_bytes(), "the file is of the inverted kind"
    assert np.abs(shown.astype(int) - RED).max() <= 6
    black = saved(tmp_path / "k.jpg", Image.new("CMYK", (16, 16), (0, 0, 0, 255)))
    assert black.max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str):
    """The stored pixels are undone by numpy, not by the function under test."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = corners()
    options = {"lossless": True} if suffix == "webp" else {}
    shown = saved(tmp_path / f"a.{suffix}", Image.fromarray(stored), exif=exif, **options)
    np.testing.assert_array_equal(shown, undo(stored))


def test_a_jpeg_photo_on_its_side_stands_up(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = saved(tmp_path / "a.jpg", Image.fromarray(corners()).resize((96, 64), 0), exif=exif)
    assert shown.shape == (96, 64, 3)
    assert np.abs(shown[8, 56].astype(int) - RED).max() < 10, "what was upper left is upper right"


def test_damaged_files_are_refused_with_their_reason(tmp_path: Path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise(64, 64)).save(whole)
    data = whole.read_bytes()
    assert data[-2:] == b"\xff\xd9"
    bad = tmp_path / "bad.jpg"
    for length in (len(data) // 2, len(data) - 200, 40, 4):
        bad.write_bytes(data[:length])
        assert reason(bad) == "truncated", length
    bad.write_bytes(b"")
    assert reason(bad) == "empty"
    bad.write_bytes(b"<!doctype html><title>404</title>")
    assert reason(bad) == "not an image"
    assert reason(tmp_path / "absent.jpg") == "missing"
    assert reason(tmp_path) == "unreadable"
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.bmp")
    assert reason(tmp_path / "a.bmp") == "not an image"


@pytest.mark.parametrize("name, options", [("a.png", {}), ("a.webp", {"lossless": True})])
def test_truncated_png_and_webp(tmp_path: Path, name: str, options: dict[str, Any]):
    path = tmp_path / name
    Image.fromarray(noise(64, 64)).save(path, **options)
    path.write_bytes(path.read_bytes()[:-2000])
    assert reason(path) == "truncated"


def test_a_damaged_middle_is_found(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(64, 64)).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert reason(path) == "corrupt"


def test_bombs_are_refused_by_their_header(tmp_path: Path):
    for side in (1001, 12_000, 20_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        bomb = png(tmp_path / "bomb.png", header, b"\0" * 10)
        assert reason(bomb) == "over-large", side
    header = struct.pack(">IIBBBBB", 1, 33, 8, 2, 0, 0, 0)
    assert reason(png(tmp_path / "thin.png", header, b"\0" * 10)) == "too thin"


def test_warnings_are_errors_outside_of_pytest_too(tmp_path: Path):
    """144 million pixels only make Pillow warn, and then decode 432 MB."""
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    bomb = png(tmp_path / "bomb.png", header, b"\0" * 10)
    program = f"""
import pathlib
from sdx.data.images import decode
try:
    decode(pathlib.Path({str(bomb)!r}), max_pixels=10**9)
except ValueError as error:
    print(error.reason)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert result.stdout == "over-large\n"


def test_the_pixel_limit_is_inclusive(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(10, 10)).save(path)
    assert pixels(path, 100).shape == (10, 10, 3)
    assert reason(path, max_pixels=99) == "over-large"


PILLOWS_NUMBERS = {
    "nearest": 0,
    "nearest_exact": 0,
    "lanczos": 1,
    "bilinear": 2,
    "bicubic": 3,
    "box": 4,
    "hamming": 5,
}  # torchvision/transforms/functional.py, pil_modes_mapping; written out so that a mix-up shows


def as_torchvision(
    image: Image.Image, side: int, number: int, crop: tuple[int, int] | None
) -> np.ndarray:
    """Resize(side, filter) and CenterCrop(side), or a crop at (top, left), on an image of Pillow.

    Sizes and offsets are torchvision's own (0.20: transforms/functional.py,
    _compute_resized_output_size and center_crop).
    """
    short, long = sorted(image.size)
    new_short, new_long = side, int(side * long / short)
    size = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
    resized = image if size == image.size else image.resize(size, number)
    centre = (
        int(round((resized.height - side) / 2.0)),
        int(round((resized.width - side) / 2.0)),
    )
    top, left = centre if crop is None else crop
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def transformed(image: np.ndarray | Image.Image, size: Any = 24, **changed: Any) -> np.ndarray:
    plain = {"interpolation": "lanczos", "center_crop": True, "random_flip": False}
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    size = (size, size) if isinstance(size, int) else size
    return training_image(picture, size, **{**plain, "seed": 0, "epoch": 0, "index": 0, **changed})


SIZES = {
    "wide": (37, 53),
    "tall": (53, 37),
    "smaller than the square": (9, 31),
    "smaller and tall": (17, 5),
    "exact": (24, 24),
    "exactly as high": (24, 61),
    "exactly as wide": (61, 24),
    "square": (64, 64),
    "one off": (64, 65),
    "thin": (7, 211),
    "photograph": (150, 200),
}


@pytest.mark.parametrize("name", PILLOWS_NUMBERS)
@pytest.mark.parametrize("height, width", SIZES.values(), ids=SIZES)
def test_every_filter_equals_torchvisions_to_the_pixel(name: str, height: int, width: int):
    picture = Image.fromarray(noise(height, width))
    for side in (24, 25):
        expected = as_torchvision(picture, side, PILLOWS_NUMBERS[name], None)
        np.testing.assert_array_equal(transformed(picture, side, interpolation=name), expected)
        mirrored = transformed(picture, side, interpolation=name, random_flip=True, index=1)
        np.testing.assert_array_equal(mirrored, expected[:, ::-1])


def test_every_filter_of_the_configuration_is_known():
    assert list(FILTERS) == [name.value for name in Interpolation]
    assert {name: int(number) for name, number in FILTERS.items()} == PILLOWS_NUMBERS


@pytest.mark.parametrize("name", PILLOWS_NUMBERS)
@pytest.mark.parametrize("height, width", [(37, 53), (53, 37), (24, 61)])
def test_random_crops_equal_torchvisions_at_the_place_drawn(name: str, height: int, width: int):
    picture = Image.fromarray(noise(height, width))
    places = covering_size(height, width, (24, 24))
    references = [
        as_torchvision(picture, 24, PILLOWS_NUMBERS[name], (top, left))
        for top in range(places[0] - 23)
        for left in range(places[1] - 23)
    ]
    for index in range(20):
        drawn = transformed(picture, interpolation=name, center_crop=False, index=index)
        assert any((drawn == reference).all() for reference in references)


def test_sizes_are_torchvisions_for_every_shape():
    """1 to 300 pixels, at the sides models are trained on; halves and thirds are among them."""
    for side in (64, 512, 768):
        for short in range(1, 300, 7):
            for long in range(short, 32 * short, max(1, short // 3)):
                expected = int(side * long / short)
                assert covering_size(short, long, (side, side)) == (side, expected)
                assert covering_size(long, short, (side, side)) == (expected, side)


@pytest.mark.parametrize(
    "height, width, resized",
    [
        (100, 200, (512, 1024)),
        (200, 100, (1024, 512)),
        (333, 500, (512, 768)),  # 512 * 500 / 333 = 768.77, cut
        (512, 777, (512, 777)),
        (3, 1, (1536, 512)),
    ],
)
def test_sizes_are_torchvisions(height: int, width: int, resized: tuple[int, int]):
    assert covering_size(height, width, (512, 512)) == resized


@pytest.mark.parametrize(
    "height, width", [(100, 200), (200, 100), (383, 640), (64, 64), (385, 640)]
)
@pytest.mark.parametrize("size", [(384, 640), (640, 384), (512, 512)])
def test_images_just_cover_other_shapes_too(height: int, width: int, size: tuple[int, int]):
    covering = covering_size(height, width, size)
    over = [got - wanted for got, wanted in zip(covering, size, strict=True)]
    assert min(over) == 0 and max(over) >= 0
    scale = max(size[0] / height, size[1] / width)
    assert max(abs(covering[0] - height * scale), abs(covering[1] - width * scale)) < 1
    assert transformed(noise(height, width), size).shape == (*size, 3)


def test_centre_offsets_round_half_to_even():
    assert center_offsets(512, 515, (512, 512)) == (0, 2)
    assert center_offsets(513, 512, (512, 512)) == (0, 0)
    assert center_offsets(519, 517, (512, 512)) == (4, 2)


def test_random_crops_and_flips_follow_seed_epoch_and_index():
    image = noise(16, 40)

    def cropped(flip: bool = False, **changed: int) -> np.ndarray:
        return transformed(image, 16, center_crop=False, random_flip=flip, **changed)

    def left(square: np.ndarray) -> int:
        return next(x for x in range(25) if (image[:, x : x + 16] == square).all())

    lefts = [left(cropped(index=i)) for i in range(300)]
    assert set(lefts) == set(range(25)), "every place is drawn, the last included"
    assert lefts == [left(cropped(index=i)) for i in range(300)]
    changes: list[dict[str, Any]] = [{"seed": 1}, {"epoch": 1}]
    for changed in changes:
        assert lefts != [left(cropped(index=i, **changed)) for i in range(300)]
    flips = [not (cropped(index=i, flip=True) == cropped(index=i)).all() for i in range(300)]
    assert 120 < sum(flips) < 180
    mirrored = [cropped(index=i)[:, ::-1] for i in range(300) if flips[i]]
    flipped = [cropped(index=i, flip=True) for i in range(300) if flips[i]]
    np.testing.assert_array_equal(mirrored, flipped)
