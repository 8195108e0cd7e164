"""`data.*` and `eval.split`: which examples there are, and what the loader makes of them."""

import multiprocessing
import time
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import numpy as np
import pytest
from pytest import approx

from sdx.config import resolve
from sdx.data.adherence import parse_caption
from sdx.data.loader import HostBatch, Loader, make_loader
from sdx.data.source import DataError, Example, Source
from sdx.data.sources import huggingface, plugins
from sdx.data.sources.hub import Repository
from sdx.data.sources.open import open_source
from sdx.experiment.setup import open_buckets
from tests.effects.effect import Case, Effect
from tests.effects.files import HEIGHT, SHADES, WIDTH


class Fixed:
    """A plugin's source: black squares with the caption of its options, slowly if they say so."""

    def __init__(self, caption: str, delay_s: float):
        self.fingerprint = caption
        self._caption = caption
        self._delay_s = delay_s

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int, /) -> Example:
        time.sleep(self._delay_s)
        return Example(np.zeros((16, 16, 3), np.uint8), (self._caption,))


def open_one(options: Mapping[str, Any], *, split: str, resolution: int) -> Fixed:
    return Fixed(options.get("caption", "plugin one"), options.get("delay_s", 0.0))


def open_two(options: Mapping[str, Any], *, split: str, resolution: int) -> Fixed:
    return Fixed("plugin two", 0.0)


def source(case: Case) -> Source:
    """What the configuration trains on."""
    points = [EntryPoint(name, f"{__name__}:open_{name}", plugins.GROUP) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "entry_points", lambda **options: EntryPoints(points))
        side = resolve.resolution(case.config)
        return open_source(case.config.data, resolution=side, say=lambda text: None)


def captions(case: Case) -> list[str]:
    """Of all examples; of a procedural source, that they are its."""
    examples = source(case)
    found = [examples[index].captions[0] for index in range(len(examples))]
    return ["shapes"] if all(parse_caption(one) for one in found) else found


def size(case: Case) -> int | str:
    """Examples in an epoch."""
    try:
        return len(source(case))
    except DataError as error:
        return str(error).partition(":")[0]


def shade(case: Case) -> float:
    """Of the first picture."""
    return float(np.asarray(source(case)[0].image).mean())


def asked_hub(case: Case) -> list[Any]:
    """Dataset and revision that the Hub is asked for."""
    asked: list[Any] = []

    def answer(name: str, revision: str | None) -> Repository:
        asked.extend([name, revision])
        raise DataError("not today")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError):
        patch.setattr(huggingface, "open_repository", answer)
        source(case)
    return asked


def batches(case: Case, count: int, examples: Source | None = None) -> list[HostBatch]:
    """The first ones of the loader."""
    with loader(case, examples) as found:
        return [next(found) for _ in range(count)]


def loader(case: Case, examples: Source | None = None) -> Loader:
    """As a run makes it, of the case's own examples unless others are given."""
    return make_loader(
        source(case) if examples is None else examples,
        case.other(()).setup.tokenizer,
        case.config.data,
        seed=case.config.run.seed,
        global_batch_size=4,
        resolution=resolve.resolution(case.config),
        buckets=open_buckets(case.config, source(case)),
    )


def shape(case: Case) -> tuple[int, ...]:
    """Of the images of a batch."""
    images = batches(case, 1)[0].images
    assert images is not None
    return images.shape[1:3]


def columns(case: Case) -> list[tuple[int, bool]]:
    """Where each of 48 crops of the ramp begins, and whether it is mirrored."""
    found = []
    for batch in batches(case, 12):
        assert batch.images is not None
        for image in batch.images:
            red = image[0, :, 0].astype(int)
            found.append((min(red[0], red[-1]) // 8, bool(red[0] > red[-1])))
    return found


def crops(case: Case) -> str:
    """Where they begin."""
    starts = {start for start, _ in columns(case)}
    if starts == {(WIDTH - HEIGHT) // 2}:
        return "centre"
    everywhere = len(starts) > 8 and min(starts) >= 0 and max(starts) <= WIDTH - HEIGHT
    return "everywhere" if everywhere else f"{starts}"


def mirrored(case: Case) -> float:
    """The share of images that are."""
    return float(np.mean([is_mirrored for _, is_mirrored in columns(case)]))


def first_red(case: Case) -> int:
    """Of the first pixel, of a picture that was halved: column 8 or 9 of the ramp, or between."""
    images = batches(case, 1)[0].images
    assert images is not None
    return int(images[0, 0, 0, 0])


def order(case: Case) -> str:
    """Of the examples of two epochs."""
    indices = np.concatenate([batch.indices for batch in batches(case, 32)]).reshape(2, 64)
    assert all(sorted(epoch) == list(range(64)) for epoch in indices)
    in_order = [list(epoch) == sorted(epoch) for epoch in indices]
    return "as stored" if all(in_order) else "shuffled" if not any(in_order) else "half"


def empty_captions(case: Case) -> float:
    """The share of captions that are empty, of 256."""
    empty = case.other(()).setup.tokenizer.encode([""])[0]
    tokens = np.concatenate([batch.tokens for batch in batches(case, 64)])
    return float(np.mean((tokens == empty).all(axis=1)))


def first_batch(case: Case) -> str:
    """What comes of a source that takes a second for an example."""
    try:
        return f"step {batches(case, 1)[0].step}"
    except DataError as error:
        return str(error).partition(":")[0]


def num_processes(case: Case) -> int:
    """That read, beside this one."""
    with loader(case) as batches:
        next(batches)
        return len(multiprocessing.active_children())


FOLDER = ("data=imagefolder", "data.dir={files}/pictures", "data.max_bad_fraction=0.5")
FIVE = (*FOLDER, 'data.split="train[:5]"')
TABLE = ("data=parquet", "data.dir={files}/tables")
HUB = ("data=huggingface", "data.name=me/data")
PLUGIN = ("data=plugin", "data.plugin=one")
SLOW = (*PLUGIN, "data.options={delay_s:0.2}")
HELD_OUT = (*FOLDER, 'data.split="train[:2]"', "eval.every=1", "eval.num_buckets=1")

EFFECTS = [
    Effect(
        "data.kind",
        "parquet",
        captions,
        ["shapes"],
        ["a large one", "a small one"],
        along=("data.dir={files}/tables",),
    ),
    Effect("data.name", "me/other", asked_hub, ["me/data", None], ["me/other", None], given=HUB),
    Effect("data.revision", "v2", asked_hub, ["me/data", None], ["me/data", "v2"], given=HUB),
    Effect(
        "data.config",
        "large",
        captions,
        ["a small one"],  # the card's default
        ["a large one"],
        given=("data=huggingface", "data.dir={files}/tables"),
    ),
    Effect("data.dir", "{files}/damaged", size, 6, 2, given=FOLDER),
    Effect(
        "data.files", "'s*'", captions, ["a large one", "a small one"], ["a small one"], given=TABLE
    ),
    Effect("data.plugin", "two", captions, ["plugin one"] * 4, ["plugin two"] * 4, given=PLUGIN),
    Effect(
        "data.options", "{caption:mine}", captions, ["plugin one"] * 4, ["mine"] * 4, given=PLUGIN
    ),
    Effect(
        "data.split",
        '"train[1:3]"',
        captions,
        ["zero", "one", "two", "three", "four", "five"],
        ["one", "two"],
        given=FOLDER,
    ),
    Effect("data.image_column", "sketch", shade, SHADES["image"], SHADES["sketch"], given=TABLE),
    Effect(
        "data.caption_column",
        "title",
        lambda case: captions(case)[0],
        "zero",
        "title zero",
        given=FOLDER,
    ),
    Effect("data.num_examples", "32", size, 64, 32),
    Effect("data.center_crop", "false", crops, "centre", "everywhere", given=FIVE),
    Effect("data.random_flip", "true", mirrored, 0, approx(0.5, abs=0.2), given=FIVE),
    Effect(
        "data.interpolation",
        "nearest",
        first_red,
        (8 * 8 + 8 * 9) // 2,
        8 * 9,
        given=(*FIVE, "data.resolution=8"),
    ),
    Effect("data.shuffle", "false", order, "shuffled", "as stored"),
    Effect("data.caption_dropout", "0.5", empty_captions, 0, approx(0.5, abs=0.1)),
    Effect(
        "data.max_bad_fraction",
        "0.5",
        size,
        "data.max_bad_fraction=0.01",
        2,
        given=("data=imagefolder", "data.dir={files}/damaged"),
    ),
    Effect("data.max_pixels", "1000", size, 6, 5, given=FOLDER),
    Effect(
        "data.buckets",
        "true",
        shape,
        (32, 32),
        (24, 48),  # two to one, of about as many pixels, in steps of 8
        given=(*FOLDER, "data.resolution=32"),
    ),
    Effect("data.num_workers", "1", num_processes, 0, 1),
    Effect(
        "data.worker_timeout_s",
        "0.3",
        first_batch,
        "step 0",
        "data.worker_timeout_s=0.3",
        given=SLOW,
    ),
    Effect(
        "eval.split",
        '"train[4:]"',
        lambda case: len(case.setup.validation or ()),
        3,
        2,
        given=(*HELD_OUT, 'eval.split="train[3:]"'),
    ),
]
