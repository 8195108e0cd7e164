"""Image files to pixels as a viewer shows them, and the resize, crop and flip of training images.

Decoding: the header decides before anything is decoded (format, size, shape); EXIF rotation is
applied, transparent pixels lie over white, 16-bit gray is scaled, CMYK is converted. Colour
profiles are not applied, as in diffusers. Pillow's `LOAD_TRUNCATED_IMAGES` is never set, and
warnings Pillow gives about a file are errors of that file.

Resize and crop compute sizes and offsets as torchvision's Resize(int), CenterCrop and RandomCrop do
on PIL images (torchvision/transforms/functional.py), which is what diffusers' training script uses.
"""

import io
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

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
"""`data.interpolation`, torchvision's names, to what torchvision takes for images of Pillow: its
nearest_exact differs from nearest for tensors only (torchvision/transforms/functional.py,
pil_modes_mapping).
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


def decode(file: Path | bytes, *, max_pixels: int) -> Image.Image:
    """The image in a file, or in the bytes of one, as a viewer shows it, in mode RGB.

    Raises `BadImageError` with the reason: missing, unreadable, empty, not an image, over-large,
    too thin, truncated or corrupt. Images of more than `max_pixels` are refused by their header.
    """
    with _opened(file, max_pixels) as image:
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


def covering_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image resized, aspect kept, so that it just covers `size`.

    One side is that of `size`, the other at least that, cut to whole pixels. For a square this is
    torchvision's Resize(int): the shorter side becomes the square's, smaller images grow.
    """
    if width * size[0] <= height * size[1]:
        return size[1] * height // width, size[1]
    return size[0], size[0] * width // height


def center_offsets(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the centre crop; halves round to even, as Python and torchvision do."""
    return round((height - size[0]) / 2), round((width - size[1]) / 2)


def training_image(
    picture: Image.Image,
    size: tuple[int, int],
    *,
    interpolation: str,
    center_crop: bool,
    random_flip: bool,
    seed: int,
    epoch: int,
    index: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image a model is trained on, of `size` (height, width): resized to cover it, cropped,
    perhaps mirrored.

    `interpolation` is a key of `FILTERS`. Crop and flip are functions of (seed, epoch, index); they
    do not depend on each other being used.
    """
    height, width = covering_size(picture.height, picture.width, size)
    if center_crop:
        top, left = center_offsets(height, width, size)
    else:
        top = randint("crop top", height - size[0] + 1, seed=seed, epoch=epoch, index=index)
        left = randint("crop left", width - size[1] + 1, seed=seed, epoch=epoch, index=index)
    box = (left, top, left + size[1], top + size[0])
    cropped = np.asarray(_crop_of_resized(picture, (width, height), box, FILTERS[interpolation]))
    if random_flip and uniform("flip", seed=seed, epoch=epoch, index=index) < 0.5:
        return cropped[:, ::-1]
    return cropped


def _crop_of_resized(
    picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resampling: int
) -> Image.Image:
    """`picture.resize(size, resampling).crop(box)`; sizes and boxes are Pillow's, width first.

    Pillow resizes along rows, rounds, then along columns; columns that the crop leaves out need not
    go through the second pass, which makes a wide photograph 5 to 8 % faster.
    """
    left, top, right, bottom = box
    if size == picture.size:
        return picture.crop(box)
    if right - left < size[0]:
        rows = picture.resize((size[0], picture.height), resampling)
        picture = rows.crop((left, 0, right, picture.height))
    resized = picture.resize((right - left, size[1]), resampling)
    return resized.crop((0, top, right - left, bottom))


def _opened(file: Path | bytes, max_pixels: int) -> Image.Image:
    """The file with its header read and judged, nothing decoded."""
    try:
        content = io.BytesIO(file) if isinstance(file, bytes) else file
        image = Image.open(content, formats=FORMATS)
    except FileNotFoundError as error:
        raise BadImageError("missing", "no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("over-large", _describe(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(_head(file)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BadImageError("unreadable", _describe(error)) from error
        reason = "truncated" if _is_cut_webp(file) else _decoding_reason(error)
        raise BadImageError(reason, _describe(error)) from error
    try:
        check_size(*image.size, max_pixels)
    except BadImageError:
        image.close()
        raise
    return image


def _head(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file[:8]
    with file.open("rb") as content:
        return content.read(8)


def _unidentified(head: bytes) -> BadImageError:
    if not head:
        return BadImageError("empty", "0 bytes")
    if head.startswith(_MAGIC):
        return BadImageError("truncated", "ends within its header")
    return BadImageError("not an image", f"neither {', '.join(FORMATS)}: begins with {head!r}")


def _is_cut_webp(file: Path | bytes) -> bool:
    """Whether the file is shorter than its RIFF header says; Pillow names no cause for it."""
    head = _head(file)
    length = len(file) if isinstance(file, bytes) else file.stat().st_size
    return head[:4] == b"RIFF" and length < 8 + int.from_bytes(head[4:], "little")


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


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _gray_16_over_white(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray_16_over_white(image: Image.Image) -> Image.Image:
    """16-bit gray scaled to 8 bits; Pillow's convert would clip 32768, mid-gray, to white."""
    levels = np.asarray(image).astype(np.uint32)
    transparent = image.info.get("transparency")  # a level of 16 bits
    gray = ((levels + 128) // 257).astype(np.uint8)
    if transparent is not None:
        gray = np.where(levels == transparent, np.uint8(255), gray)
    return Image.fromarray(gray).convert("RGB")
