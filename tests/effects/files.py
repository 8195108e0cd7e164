"""Files that rows read: a model in diffusers' layout, a UNet alone, pictures and tables of them.

What was read is told by one number of each network, which is another in every file.
"""

import io
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdx.weights.export import save_unet
from tests.effects.effect import Case

VAE = "vae/diffusion_pytorch_model"
MARKS = {"unet": "conv_in.bias", "vae": "encoder.conv_in.bias"}
"""The parameter whose first number tells files apart."""
PLAIN, VARIANT, ALONE = 1.0, 2.0, 3.0
CAPTIONS = ["zero", "one", "two", "three", "four", "five"]
WIDTH, HEIGHT = 32, 16
SHADES = {"image": 255, "sketch": 0}


def make_files(folder: Path, base: Case) -> None:
    """`model/`, with files of the variant fp16 beside the plain ones, `alone/`, `pictures/` and
    `tables/`."""
    _make_model(folder / "model", base)
    unet = base.program.networks.unet.init(jax.random.key(1))
    (folder / "alone").mkdir()
    save_unet(unet, base.config.model.unet, folder / "alone", "float32")
    _mark(folder / "alone" / "unet" / "diffusion_pytorch_model.safetensors", "unet", ALONE)
    _make_pictures(folder / "pictures")
    _make_tables(folder / "tables")


def _make_model(folder: Path, base: Case) -> None:
    """The embedded model with a UNet; its autoencoder says another scaling factor."""
    shutil.copytree(Path(str(files("sdx") / "assets" / "tiny")), folder)
    shutil.rmtree(folder / "unet")
    unet = base.program.networks.unet.init(jax.random.key(0))
    save_unet(unet, base.config.model.unet, folder, "float32")
    for component in ("unet", "vae", "text_encoder"):
        [plain] = (folder / component).glob("*.safetensors")
        variant = plain.with_suffix(".fp16.safetensors")
        shutil.copyfile(plain, variant)
        if component in MARKS:
            _mark(plain, component, PLAIN)
            _mark(variant, component, VARIANT)


def _mark(file: Path, component: str, number: float) -> None:
    tensors = load_file(file)
    tensors[MARKS[component]] = np.full_like(tensors[MARKS[component]], number)
    save_file(tensors, file)


def rewrite(folder: Path, component: str, **fields: Any) -> None:
    """Other fields in a component's config.json."""
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _make_pictures(folder: Path) -> None:
    """Pictures twice as wide as high whose red is 8 x the column, the last one of twice the size;
    two columns of captions. Beside them `damaged/`, of whose three files one is no picture."""
    folder.mkdir()
    columns = np.broadcast_to(np.arange(WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, WIDTH, 3))
    rows = []
    for index, caption in enumerate(CAPTIONS):
        ramp, own = np.array([8, 0, 0], np.uint8), np.array([0, 0, index], np.uint8)
        picture = Image.fromarray(columns * ramp + own)
        size = 2 if index == len(CAPTIONS) - 1 else 1
        picture = picture.resize((size * WIDTH, size * HEIGHT), Image.Resampling.NEAREST)
        picture.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": caption, "title": f"title {caption}"})
    _write_table(folder, rows)
    damaged = folder.parent / "damaged"
    damaged.mkdir()
    for index in range(3):
        shutil.copyfile(folder / f"{index}.png", damaged / f"{index}.png")
    (damaged / "1.png").write_bytes(b"no picture")
    _write_table(damaged, rows[:3])


def _write_table(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def _make_tables(folder: Path) -> None:
    """Two files, each a configuration of the card, with a white and a black picture in a row."""
    folder.mkdir()
    for name in ("large", "small"):
        shades = {column: [{"bytes": _png(n), "path": None}] for column, n in SHADES.items()}
        table = pa.table({**shades, "text": [f"a {name} one"]})
        pq.write_table(table, folder / f"{name}.parquet")
    configs = "".join(
        f"- config_name: {name}\n  default: {str(name == 'small').lower()}\n"
        f"  data_files: {name}.parquet\n"
        for name in ("large", "small")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def _png(level: int) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(written, "PNG")
    return written.getvalue()
