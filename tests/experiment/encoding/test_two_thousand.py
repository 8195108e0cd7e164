"""2,000 photographs, half of them stored awkwardly: encoded, and read by changing numbers of
processes from pixels and from the cache, with every index once an epoch."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from sdx.config.compose import compose
from sdx.config.schema import Cache, Config
from sdx.data.loader import HostBatch, make_loader
from sdx.data.source import Source
from sdx.experiment.caching import training_source
from sdx.experiment.encoding.encoding import encode, prepare

NUM_IMAGES = 2000
SIDE = 64
BATCH = 96  # does not divide the images
SPANS = ((0, 13, 1), (13, 27, 2), (27, 42, 4))  # steps, and processes that read them: 2 epochs
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def stored(picture: Image.Image, awkwardness: int) -> tuple[str, bytes]:
    """Suffix and content of a file; half of them are not the plain JPEG that all code reads."""
    turned = Image.Exif()
    turned[0x0112] = 3 + awkwardness % 6
    gray = np.asarray(picture.convert("L"))
    ways: list[tuple[str, Image.Image, dict[str, Any]]] = [
        (".png", picture.quantize(64), {"transparency": 3}),
        (".png", picture.convert("L"), {}),
        (".png", Image.fromarray(gray.astype(np.uint16) * 257), {}),
        (".jpg", picture.convert("CMYK"), {}),
        (".jpeg", picture, {"exif": turned}),
        (".webp", Image.merge("RGBA", (*picture.split(), picture.convert("L"))), {"method": 0}),
        (".png", picture.convert("1"), {}),
        (".PNG", picture.convert("LA"), {}),
    ]
    suffix, image, options = (".jpg", picture, {})
    if awkwardness % 2:
        suffix, image, options = ways[awkwardness // 2 % len(ways)]
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[suffix.lower()], **options)
    return suffix, content.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of scikit-image's photographs, each of its own size, with one to three captions."""
    folder = tmp_path_factory.mktemp("photos")
    whole = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    rng, rows = np.random.default_rng(0), []
    for i in range(NUM_IMAGES):
        photograph = whole[i % len(whole)]
        width, height = (int(side) for side in rng.integers(60, 100, 2))
        left, top = (
            int(rng.integers(0, extent - side))
            for extent, side in zip(photograph.size, (width, height), strict=True)
        )
        suffix, content = stored(photograph.crop((left, top, left + width, top + height)), i)
        (folder / f"{i:04}{suffix}").write_bytes(content)
        captions = [f"picture {i}", f"{PHOTOGRAPHS[i % len(whole)]} at {left}", f"the {i}"]
        rows.append(json.dumps({"file_name": f"{i:04}{suffix}", "text": captions[: 1 + i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def global_batches(config: Config, source: Source, tokenizer: Any) -> Iterator[list[HostBatch]]:
    """The parts of each step's batch, by process; their number changes in mid-epoch."""
    for first, end, process_count in SPANS:
        loaders = [
            make_loader(
                source, tokenizer, config.data, seed=config.run.seed, global_batch_size=BATCH,
                resolution=SIDE, start_step=first,
                rows=range(BATCH)[rank * BATCH // process_count :][: BATCH // process_count],
            )
            for rank in range(process_count)
        ]  # fmt: skip
        try:
            for step in range(first, end):
                parts = [next(loader) for loader in loaders]
                assert {part.step for part in parts} == {step}
                yield parts
        finally:
            for loader in loaders:
                loader.close()


def test_every_index_once_an_epoch_from_pixels_and_from_the_cache(
    photos: Path, tmp_path: Path
) -> None:
    """Read by 1, then 2, then 4 processes, each change in mid-epoch."""
    config = compose([
        "data=imagefolder", f"data.dir={photos}", f"data.resolution={SIDE}",
        f"data.cache_dir={tmp_path}", "data.cache=moments", "data.center_crop=false",
        "data.random_flip=true", "data.cache_views=2", "data.caption_dropout=0.1",
        f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
    ])  # fmt: skip
    assert encode(config, []) == 0
    job = prepare(config)
    cached = training_source(config, job.source, job.weights)
    online = replace(config, data=replace(config.data, cache=Cache.none, cache_views=None))
    seen: Counter[tuple[int, int]] = Counter()
    num_epochs = SPANS[-1][1] * BATCH // NUM_IMAGES
    pairs = zip(
        global_batches(config, cached, job.tokenizer),
        global_batches(online, job.source, job.tokenizer),
        strict=True,
    )
    for ours, pixels in pairs:
        for cache_part, part in zip(ours, pixels, strict=True):
            assert cache_part.moments is not None and part.images is not None
            assert not part.bad_images and part.weights.all() and cache_part.weights.all()
            for name in ("indices", "epochs", "tokens"):
                np.testing.assert_array_equal(getattr(cache_part, name), getattr(part, name))
            seen.update(zip(part.epochs.tolist(), part.indices.tolist(), strict=True))
    assert set(seen.values()) == {1}
    assert num_epochs == 2
    per_epoch = Counter(epoch for epoch, _ in seen)
    assert [per_epoch[epoch] for epoch in range(num_epochs)] == [NUM_IMAGES] * num_epochs
