"""Pictures for people: a grid of samples with their captions, and the curve of the loss."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from sdx.record.store import AnyPath, write_bytes

TILE = 192  # smallest side of a tile; smaller images are enlarged by a whole number
MARGIN = 12
CAPTION_SIZE = 14
MAX_CAPTION_LINES = 3
BACKGROUND, INK = (255, 255, 255), (32, 32, 32)
CURVE, RAW, BAD = "#1b6ca8", "#b9cfe0", "#c0392b"
SMOOTHING = 0.05  # window of the smoothed curve as a share of all rows
LOG_RANGE = 5.0  # losses that span more than this factor are drawn on a log scale


def to_uint8(images: Float[np.ndarray, "b H W 3"]) -> UInt8[np.ndarray, "b H W 3"]:
    """Images in [-1, 1] as 0 to 255, clipped; one that is not finite is black."""
    scaled = np.nan_to_num(images, nan=-1.0, posinf=1.0, neginf=-1.0) * 127.5 + 127.5
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def make_grid(
    images: UInt8[np.ndarray, "b H W 3"], captions: Sequence[str], *, num_columns: int | None = None
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """All images on one white sheet, each over its caption; small ones enlarged pixel by pixel."""
    count, height, width, _ = images.shape
    assert count == len(captions), f"{count} images, {len(captions)} captions"
    zoom = max(1, -(-TILE // max(height, width)))
    columns = num_columns or min(count, max(1, round(count**0.5 * 1.25)))
    font = ImageFont.load_default(CAPTION_SIZE)
    wrapped = [_wrap(caption, width * zoom, font) for caption in captions]
    line = CAPTION_SIZE + 4
    text_height = line * max(len(lines) for lines in wrapped) + MARGIN // 2
    cell = (width * zoom + MARGIN, height * zoom + text_height + MARGIN)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, (pixels, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        tile = Image.fromarray(pixels).resize(
            (width * zoom, height * zoom), Image.Resampling.NEAREST
        )
        sheet.paste(tile, (x, y))
        draw.multiline_text((x, y + height * zoom + 4), "\n".join(lines), INK, font, spacing=4)
    return np.asarray(sheet)


def save_png(image: UInt8[np.ndarray, "H W 3"], path: AnyPath) -> None:
    """Writes `image` so that a file of that name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    write_bytes(path, png.getvalue())


def plot_loss(
    steps: Sequence[int], losses: Sequence[float | None], *, title: str
) -> UInt8[np.ndarray, "H W 3"]:
    """The loss of each reported step, pale, under its running mean; bad steps as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    good = [(s, v) for s, v in zip(steps, losses, strict=True) if v is not None and np.isfinite(v)]
    bad = [s for s, v in zip(steps, losses, strict=True) if v is None or not np.isfinite(v)]
    if good:
        x, y = (np.array(column, float) for column in zip(*good, strict=True))
        smooth = _running_mean(y, max(1, round(SMOOTHING * len(y))))
        axes.plot(x, y, color=RAW, linewidth=0.8, label="each step")
        axes.plot(x, smooth, color=CURVE, linewidth=2, label="mean")
        if y.min() > 0 and smooth.max() / smooth.min() > LOG_RANGE:
            axes.set_yscale("log")
    if bad:
        floor = axes.get_xaxis_transform()  # y as a share of the height
        axes.plot(bad, [0.02] * len(bad), "x", color=BAD, transform=floor, label="skipped")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if good or bad:
        axes.legend(frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` values around each; at the ends over as many as there are."""
    kernel = np.ones(window)
    total = np.convolve(y, kernel, mode="same")
    return total / np.convolve(np.ones_like(y), kernel, mode="same")


def _wrap(
    caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """The caption in lines no wider than `width` pixels, cut with an ellipsis after a few."""
    text = " ".join(caption.split())
    letters = max(4, int(width / font.getlength("n")))
    lines = textwrap.wrap(text, letters, max_lines=MAX_CAPTION_LINES, placeholder=" …") or [""]
    return [line if font.getlength(line) <= width else line[: letters - 1] + "…" for line in lines]
