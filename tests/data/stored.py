"""The same pictures and captions, stored in each way that sdx reads."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdx.config.schema import DataConfig, DataKind
from sdx.data.sources import arrayrecord


@dataclass(frozen=True)
class Stored:
    """An image file's content and the captions that go with it."""

    name: str
    image: bytes
    captions: tuple[str, ...]


def awkward() -> list[Stored]:
    """Pictures of every mode and format that viewers show and naive code gets wrong."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (9, 14), np.uint16))
    alpha = Image.fromarray(rng.integers(0, 256, (9, 14, 4), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "0_rgb.png": (rgb, {}),
        "1_palette.png": (rgb.quantize(16), {"transparency": 3}),
        "2_gray.png": (rgb.convert("L"), {}),
        "3_deep.png": (deep, {}),
        "4_alpha.webp": (alpha, {"lossless": True}),
        "5_cmyk.jpg": (rgb.convert("CMYK"), {}),
        "6_turned.jpg": (rgb, {"exif": turned}),
        "7_one_bit.png": (rgb.convert("1"), {}),
    }
    captions = [("one",), ("zwei Füße", "two"), ("  three ",), ("4",), ("五",), ("six",)]
    captions += [("seven", " ", "7"), ("eight",)]
    return [
        Stored(name, encoded(image, name, **options), texts)
        for (name, (image, options)), texts in zip(files.items(), captions, strict=True)
    ]


def encoded(image: Image.Image, name: str = "a.png", **options: Any) -> bytes:
    """The content of the image's file."""
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[Path(name).suffix], **options)
    return content.getvalue()


def plain(num_examples: int) -> list[Stored]:
    """Small pictures of one colour each."""
    return [
        Stored(f"{i:03}.png", encoded(Image.new("RGB", (8, 6), (i, 2 * i, 255 - i))), (f"n{i}",))
        for i in range(num_examples)
    ]


def as_folder(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    base = folder / split
    base.mkdir(parents=True)
    for example in examples:
        (base / example.name).write_bytes(example.image)
    rows = [{"file_name": e.name, "text": list(e.captions)} for e in examples]
    (base / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataConfig(kind=DataKind.imagefolder, dir=str(folder))


def as_table(examples: list[Stored], **columns: Any) -> Any:
    """A table of `datasets`, images as its Image feature stores them."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows = {
        "image": [{"bytes": e.image, "path": e.name} for e in examples],
        "text": [list(e.captions) for e in examples],
    }
    features = {"image": ImageFeature(), "text": List(Value("string"))}
    return Dataset.from_dict(rows | columns, features=Features(features) if not columns else None)


def as_saved(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    from datasets import DatasetDict

    DatasetDict({split: as_table(examples)}).save_to_disk(str(folder))
    return DataConfig(kind=DataKind.huggingface, dir=str(folder))


def as_repository(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    (folder / "data").mkdir(parents=True)
    half = len(examples) // 2
    for number, part in enumerate((examples[:half], examples[half:])):
        as_table(part).to_parquet(folder / f"data/{split}-{number:05}-of-00002.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        f"  - split: {split}\n    path: data/{split}-*\n---\n# A card\n"
    )
    return DataConfig(kind=DataKind.huggingface, name=str(folder))


def as_image_repository(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    as_folder(folder, examples, split)
    return DataConfig(kind=DataKind.huggingface, name=str(folder))


def as_parquet(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    """As other tools than `datasets` write it: plain bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image": [e.image for e in examples], "text": [list(e.captions) for e in examples]}
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return DataConfig(kind=DataKind.parquet, dir=str(folder))


def as_arrow(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    as_table(examples).save_to_disk(str(folder / split))
    return DataConfig(kind=DataKind.parquet, dir=str(folder), files=f"{split}/*.arrow")


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def as_shards(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    half = len(examples) // 2
    for number, part in enumerate((examples[:half], examples[half:])):
        members: dict[str, bytes] = {"notes.pkl": b"\x80\x04."}
        for example in part:
            key = f"deep/{Path(example.name).stem}"
            members[f"{key}.cls"] = b"3"
            members[f"{key}{Path(example.name).suffix.upper()}"] = example.image
            texts = {"text": list(example.captions)} if len(example.captions) > 1 else {"id": 1}
            members[f"{key}.json"] = json.dumps(texts).encode()
            if "text" not in texts:
                members[f"{key}.txt"] = "".join(example.captions).encode()
        write_tar(folder / f"{split}-{number}.tar", members)
    return DataConfig(kind=DataKind.webdataset, dir=str(folder))


def as_records(folder: Path, examples: list[Stored], split: str = "train") -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    half = len(examples) // 2
    for number, part in enumerate((examples[:half], examples[half:])):
        path = folder / f"{split}-{number}.array_record"
        arrayrecord.write(path, [(example.image, example.captions) for example in part])
    return DataConfig(kind=DataKind.arrayrecord, dir=str(folder))


WAYS: dict[str, Callable[..., DataConfig]] = {
    "folder": as_folder,
    "save_to_disk": as_saved,
    "repository of parquet": as_repository,
    "repository of images": as_image_repository,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "tar": as_shards,
    "ArrayRecord": as_records,
}
