"""Image files to pixels as a viewer shows them, and the resize, crop and flip of training images.

Decoding: the header decides before anything is decoded (format, size, shape); EXIF rotation is
applied, transparent pixels lie over white, 16-bit gray is scaled, CMYK is converted. Colour
profiles are not applied, as in diffusers. Pillow's `LOAD_TRUNCATED_IMAGES` is never set, and
warnings Pillow gives about a file are errors of that file.

Resize and crop compute sizes and offsets as torchvision's Resize(int), CenterCrop and RandomCrop do
on PIL images (torchvision/transforms/functional.py), which is what diffusers' training script uses.
"""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from sdx.data.draws import randint, uniform
from sdx.data.source import BadImageError

FORMATS = ("JPEG", "PNG", "WEBP")
"""All that Pillow may try; each further decoder is attack surface (a dozen CVEs a year)."""

MAX_ASPECT = 32
"""Longest side over shortest; a line of 1 × 40,000,000 pixels would grow beyond memory when
resized.
"""

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")

# Once and for every thread: `warnings.catch_warnings` around a call is not safe in threads.
warnings.filterwarnings("error", module=r"PIL\.")


def decode(path: Path, *, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image file as a viewer shows them.

    Raises `BadImageError` with the reason: missing, unreadable, empty, not an image, over-large,
    too thin, truncated or corrupt. Images of more than `max_pixels` are refused by their header.
    """
    with _opened(path, max_pixels) as image:
        try:
            image.load()
            upright = _upright(image)
            return _over_white(upright)
        except Exception as error:  # decoders of hostile bytes raise anything, SyntaxError included
            raise BadImageError(_decoding_reason(error), _describe(error)) from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises `BadImageError` where an image of this size is refused unseen."""
    if width * height > max_pixels:
        raise BadImageError("over-large", f"{width} × {height} > {max_pixels} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError("too thin", f"{width} × {height}: more than {MAX_ASPECT} to 1")


def resize_shorter_side(
    image: UInt8[np.ndarray, "H W 3"], resolution: int, interpolation: str
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with its shorter side at `resolution` pixels, smaller ones enlarged; aspect kept.

    `interpolation` is a name of Pillow's resampling filters in lower case.
    """
    height, width = image.shape[:2]
    short, long = sorted((height, width))
    new_long = int(resolution * long / short)
    size = (resolution, new_long) if width <= height else (new_long, resolution)
    if size == (width, height):
        return image
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling[interpolation.upper()]))


def crop(
    image: UInt8[np.ndarray, "H W 3"], resolution: int, top: int, left: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The square of `resolution` pixels whose upper left corner is at (top, left)."""
    return image[top : top + resolution, left : left + resolution]


def center_offsets(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Top and left of the centre crop; halves round to even, as Python and torchvision do."""
    return round((height - resolution) / 2), round((width - resolution) / 2)


def training_image(
    image: UInt8[np.ndarray, "H W 3"],
    resolution: int,
    *,
    interpolation: str,
    center_crop: bool,
    random_flip: bool,
    seed: int,
    epoch: int,
    index: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """The square image a model is trained on: shorter side resized, cropped, perhaps mirrored.

    Crop and flip are functions of (seed, epoch, index); they do not depend on each other being
    used.
    """
    resized = resize_shorter_side(image, resolution, interpolation)
    height, width = resized.shape[:2]
    if center_crop:
        top, left = center_offsets(height, width, resolution)
    else:
        top = randint("crop top", height - resolution + 1, seed=seed, epoch=epoch, index=index)
        left = randint("crop left", width - resolution + 1, seed=seed, epoch=epoch, index=index)
    square = crop(resized, resolution, top, left)
    if random_flip and uniform("flip", seed=seed, epoch=epoch, index=index) < 0.5:
        square = square[:, ::-1]
    return np.ascontiguousarray(square)


def _opened(path: Path, max_pixels: int) -> Image.Image:
    """The file with its header read and judged, nothing decoded."""
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError as error:
        raise BadImageError("missing", "no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("over-large", _describe(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(path) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BadImageError("unreadable", _describe(error)) from error
        reason = "truncated" if _is_cut_webp(path) else _decoding_reason(error)
        raise BadImageError(reason, _describe(error)) from error
    try:
        check_size(*image.size, max_pixels)
    except BadImageError:
        image.close()
        raise
    return image


def _unidentified(path: Path) -> BadImageError:
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        return BadImageError("empty", "0 bytes")
    if head.startswith(_MAGIC):
        return BadImageError("truncated", "ends within its header")
    return BadImageError("not an image", f"neither {', '.join(FORMATS)}: begins with {head!r}")


def _is_cut_webp(path: Path) -> bool:
    """Whether the file is shorter than its RIFF header says; Pillow names no cause for it."""
    with path.open("rb") as file:
        head = file.read(8)
    return head[:4] == b"RIFF" and path.stat().st_size < 8 + int.from_bytes(head[4:], "little")


def _decoding_reason(error: Exception) -> str:
    message = str(error).lower()
    is_cut = isinstance(error, EOFError) or "truncated" in message or "incomplete" in message
    return "truncated" if is_cut else "corrupt"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _upright(image: Image.Image) -> Image.Image:
    # not ImageOps.exif_transpose: that also writes the EXIF block anew, which fails on odd tags
    transpose = _TRANSPOSES.get(image.getexif().get(_ORIENTATION_TAG, 1))
    if transpose is None:
        return image
    upright = image.transpose(transpose)
    upright.info = image.info
    return upright


def _over_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode.startswith("I"):
        return _gray_16_over_white(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _gray_16_over_white(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """16-bit gray scaled to 8 bits; Pillow's convert would clip 32768, mid-gray, to white."""
    levels = np.asarray(image).astype(np.uint32)
    transparent = image.info.get("transparency")  # a level of 16 bits
    gray = ((levels + 128) // 257).astype(np.uint8)
    if transparent is not None:
        gray = np.where(levels == transparent, np.uint8(255), gray)
    return np.repeat(gray[..., None], 3, axis=2)
