"""What the loader can do: images from files against Pillow alone, records from a cache, and whether
a run waits for its data.

    python tests/benchmarks/loader.py [images] [cache] [run] [--rounds N] [--steps N]

Images and records a second are of one core, by the process's CPU time; wall time is beside it and
means something on an idle machine only. Exits with 1 where a bound of `BOUNDS` is not met.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sdx import assets
from sdx.config import resolve
from sdx.config.compose import compose
from sdx.config.schema import DataConfig, DataKind
from sdx.data.cache.records import CacheIndex, CacheKey, Layout, MomentsRecord, read_shard
from sdx.data.cache.rows import CachedMoments, CachedSource, Records
from sdx.data.cache.shards import ShardWriter
from sdx.data.images import decode, training_image
from sdx.data.loader import Loader, make_loader
from sdx.data.shapes import ShapesSource
from sdx.data.sources.open import open_source
from sdx.data.tokenizer import Tokenizer, load_tokenizer
from sdx.record.files import write_json

SIDE = 512
SOURCES = {"512 x 512": (512, 512), "1024 x 768": (1024, 768), "1024 x 1024": (1024, 1024)}
"""Width and height of the files."""
BOUNDS = {"images": 0.98, "records": 50_000.0, "data_wait": 0.02, "loader": 1.5}
"""Images: share of what Pillow alone does, 1 less what the clock is off by. Records a second.
Share of the step that waits. Batches of the loader alone to steps."""
DEFAULT_RUN = ["sample.every=null", "export.at_end=false", "metrics.every=1"]


@dataclass(frozen=True)
class Rate:
    """Of one piece of work, a second of CPU and of wall time."""

    per_cpu_s: float
    per_wall_s: float

    def __str__(self) -> str:
        return f"{self.per_cpu_s:10,.0f}/s of CPU {self.per_wall_s:10,.0f}/s of wall"


def rate(work: Callable[[], int]) -> Rate:
    """Of one call of `work`, which says how much it did."""
    cpu, wall = time.process_time(), time.perf_counter()
    done = work()
    return Rate(done / (time.process_time() - cpu), done / (time.perf_counter() - wall))


def median(rates: Sequence[Rate]) -> Rate:
    return Rate(
        statistics.median(each.per_cpu_s for each in rates),
        statistics.median(each.per_wall_s for each in rates),
    )


def by_pillow(path: Path, side: int) -> np.ndarray:
    """As a script for one file would do it: open, convert, resize, crop, to an array."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    short, long = sorted(image.size)
    long = int(side * long / short)
    size = (side, long) if image.width <= image.height else (long, side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def by_sdx(path: Path, side: int) -> np.ndarray:
    plain = {"interpolation": "lanczos", "center_crop": True, "random_flip": False}
    picture = decode(path, max_pixels=40_000_000)
    return training_image(picture, (side, side), **plain, seed=0, epoch=0, index=0)


def photograph(path: Path, size: tuple[int, int]) -> None:
    """A JPEG of this width and height with a photograph's mix of smooth and rough."""
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize(size, 3)
    grain = rng.normal(0, 6, (size[1], size[0], 3))
    Image.fromarray(np.uint8(np.clip(np.asarray(rough) + grain, 0, 255))).save(path, quality=90)


def measure_images(rounds: int, side: int = SIDE, images: int = 20) -> list[bool]:
    """Both ways in turn, on the same file, compared to the pixel."""
    met = []
    for name, size in SOURCES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "photograph.jpg")
            photograph(path, size)
            np.testing.assert_array_equal(by_sdx(path, side), by_pillow(path, side))
            pillow, ours = [], []
            for _ in range(rounds):
                for read, rates in ((by_pillow, pillow), (by_sdx, ours)):
                    rates.append(rate(partial(_read_often, read, path, side, images)))
        ratio = statistics.median(
            a.per_cpu_s / b.per_cpu_s for a, b in zip(ours, pillow, strict=True)
        )
        print(f"images of {name:11}: Pillow alone {median(pillow)}")
        print(f"{'':21}  sdx          {median(ours)}   ratio {ratio:.3f}")
        met.append(ratio >= BOUNDS["images"])
    return met


def _read_often(read: Callable[[Path, int], np.ndarray], path: Path, side: int, times: int) -> int:
    for _ in range(times):
        read(path, side)
    return times


def make_cache(folder: Path, num_examples: int) -> Records:
    """Random moments of 512-pixel images, 66 KB each."""
    rng = np.random.default_rng(0)
    key = CacheKey("moments", {"examples": "random"})
    layout = Layout(num_examples)
    for number in range(layout.num_shards):
        shard = ShardWriter(folder, number)
        for index in layout.examples(number):
            moments = rng.normal(size=(SIDE // 8, SIDE // 8, 8)).astype(np.float16)
            tokens = rng.integers(0, 49408, (1, 77), dtype=np.int32)
            shard.add(MomentsRecord(index, 0, moments, tokens, 0).pack(key.digest))
        shard.finish({})
    shards = (read_shard(folder, number) for number in range(layout.num_shards))
    shape = (SIDE // 8, SIDE // 8, 8)
    index = CacheIndex(num_examples, 1, shape, tuple(shard for shard in shards if shard))
    write_json(folder / "index.json", index.to_json())
    return Records(folder, key.digest)


def measure_cache(
    rounds: int, num_examples: int = 512, batch: int = 32, workers: Sequence[int] = (0, 1)
) -> list[bool]:
    """Records parsed and copied into a batch, from memory; and whole batches by the loader."""
    with tempfile.TemporaryDirectory() as folder:
        records = make_cache(Path(folder), num_examples)
        raw = [
            records.read(*divmod(index, records.layout.shard_examples), unpack=bytes)
            for index in range(min(num_examples, 256))
        ]
        images = np.zeros((batch, *records.index.shape), np.float16)
        tokens = np.zeros((batch, 77), np.int32)

        def parse_and_copy() -> int:
            for index, record in enumerate(raw):
                found = MomentsRecord.unpack(record, digest=records.digest, index=index, view=0)
                images[index % batch] = found.moments
                tokens[index % batch] = found.tokens[0]
            return len(raw)

        parsed = median([rate(parse_and_copy) for _ in range(5 * rounds)])
        print(f"records, parse and copy      {parsed}")
        moments = CachedMoments(records)
        source = CachedSource(ShapesSource(num_examples, SIDE, "train"), moments)
        for num_workers in workers:
            data = DataConfig(kind=DataKind.shapes, num_workers=num_workers)
            with make_loader(
                source, tokenizer(), data, seed=0, global_batch_size=batch, resolution=SIDE
            ) as batches:
                next(batches)
                whole = rate(partial(_take, batches, 40 * rounds))
            of = "of this process" if num_workers else "and hash"
            print(f"records by the loader, {num_workers} workers {whole} ({of})")
    return [parsed.per_cpu_s >= BOUNDS["records"]]


def tokenizer() -> Tokenizer:
    """That of the default model; rows of 77 ids."""
    return load_tokenizer(Path(assets.__file__).parent / "tiny" / "tokenizer")


def _take(loader: Loader, batches: int) -> int:
    return sum(len(batch.weights) for batch in islice(loader, batches))


def measure_run(steps: int) -> list[bool]:
    """The default run: how long it waits for data, and how fast its loader is by itself."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sdx.train", *DEFAULT_RUN, f"train.max_steps={steps}"]
        subprocess.run(
            [*command, f"run.output_dir={folder}"], check=True, stdout=subprocess.DEVNULL
        )
        (file,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()][5:]
    step_s = statistics.median(row["step_s"] for row in rows)
    wait = sum(row["data_wait"] * row["step_s"] for row in rows) / sum(r["step_s"] for r in rows)
    alone = default_loader_rate(batches=200)
    ratio = alone.per_wall_s * step_s
    print(f"default run: step {1000 * step_s:.1f} ms, waits for data {100 * wait:.3f} % of it")
    print(f"its loader alone, batches    {alone}   {ratio:.1f} x the steps")
    return [wait < BOUNDS["data_wait"], ratio >= BOUNDS["loader"]]


def default_loader_rate(batches: int) -> Rate:
    config = resolve.with_global_batch(compose([]))
    side = resolve.resolution(config)
    with make_loader(
        open_source(config.data, resolution=side, say=lambda line: None),
        tokenizer(),
        config.data,
        seed=0,
        global_batch_size=resolve.global_batch_size(config),
        resolution=side,
    ) as loader:
        next(loader)
        examples = rate(partial(_take, loader, batches))
    size = resolve.global_batch_size(config)
    return Rate(examples.per_cpu_s / size, examples.per_wall_s / size)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="images|cache|run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    parts: dict[str, Callable[[], list[bool]]] = {
        "images": lambda: measure_images(options.rounds),
        "cache": lambda: measure_cache(options.rounds),
        "run": lambda: measure_run(options.steps),
    }
    met = [each for name in options.parts or parts for each in parts[name]()]
    print("all bounds met" if all(met) else f"{met.count(False)} of {len(met)} bounds missed")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
