"""Shapes of buckets, which image goes where, and the batches read from them."""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest

from sdx.data.buckets import Buckets, bucket_sizes, describe, make_buckets, nearest_buckets
from sdx.data.loader import HostBatch, make_loader
from sdx.data.source import DataError, Example, Source, first_examples
from tests.data.test_loader import DATA, Letters, Numbered, assert_equal

pytestmark = pytest.mark.fast

SIDE, MULTIPLE = 32, 8
LIVELY = replace(DATA, buckets=True, center_crop=False, random_flip=True, caption_dropout=0.3)


@dataclass(frozen=True)
class Framed:
    """Images of three shapes; the pixels of image i are i + 1, black at the outermost edge."""

    length: int = 13
    fingerprint: str = "framed"

    def __len__(self) -> int:
        return self.length

    @property
    def sizes(self) -> np.ndarray:
        shapes = [(40, 80), (50, 50), (90, 50)]
        return np.array([shapes[i % 7 % 3] for i in range(self.length)], np.int32)

    def __getitem__(self, index: int) -> Example:
        image = np.full((*self.sizes[index], 3), index + 1, np.uint8)
        image[0] = image[-1] = image[:, 0] = image[:, -1] = 0
        return Example(image, (f"a{index}", f"b{index}"))


def buckets_of(source: Source) -> Buckets:
    return make_buckets(source, SIDE, MULTIPLE)


def take(count: int, *, start: int = 0, rows: range = range(4)) -> list[HostBatch]:
    source = Framed()
    with make_loader(
        source,
        Letters(),
        LIVELY,
        seed=3,
        global_batch_size=4,
        resolution=SIDE,
        start_step=start,
        rows=rows,
        buckets=buckets_of(source),
    ) as batches:
        return list(islice(batches, count))


def images(batch: HostBatch) -> np.ndarray:
    assert batch.images is not None
    return batch.images


@pytest.mark.parametrize("resolution, multiple", [(512, 64), (768, 64), (1024, 64), (64, 16)])
def test_shapes_are_multiples_of_about_the_squares_area(resolution: int, multiple: int):
    shapes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes) > 4
    assert {(width, height) for height, width in shapes} == set(shapes)
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert 0.8 < height * width / resolution**2 < 1.25
        assert 1 / 2.3 < width / height < 2.3


def test_the_shapes_of_stable_diffusion():
    assert bucket_sizes(512, 64) == [
        (704, 384), (640, 448), (576, 448), (512, 512), (448, 576), (448, 640), (384, 704)
    ]  # fmt: skip
    assert bucket_sizes(64, 64) == [(64, 64)]


def test_images_go_to_the_nearest_ratio():
    shapes = bucket_sizes(512, 64)
    sizes = [(512, 512), (1000, 1100), (600, 800), (600, 900), (100, 3000), (3000, 100), (1, 1)]
    found = [shapes[i] for i in nearest_buckets(np.array(sizes, np.int32), shapes)]
    assert found == [
        (512, 512), (512, 512), (448, 576), (448, 640), (384, 704), (704, 384), (512, 512)
    ]  # fmt: skip


def test_only_shapes_that_occur_become_buckets():
    buckets = buckets_of(Framed())
    assert buckets.sizes == ((40, 24), (32, 32), (24, 48))
    assert sum(len(members) for members in buckets.members) == 13
    assert sum(buckets.shares(4).values()) == pytest.approx(1)
    square, wide = describe(buckets_of(first_examples(Framed(), 2))).partition(": ")[::2]
    assert (square, wide) == ("2 programs, one per bucket", "32x32 (1 images), 24x48 (1 images)")


def test_a_source_without_sizes_is_refused():
    with pytest.raises(DataError, match=r"data\.buckets=true: this source does not know the sizes"):
        buckets_of(Numbered())


def test_batches_have_the_shape_of_their_bucket_and_count_each_image_once():
    batches = take(4)
    buckets = buckets_of(Framed())
    assert sum(buckets.num_batches(4)) == 4
    for batch in batches:
        assert {buckets.size_of(int(i)) for i in batch.indices} == {images(batch).shape[1:3]}
        np.testing.assert_array_equal(images(batch)[:, 8, 8, 0], batch.indices + 1)
    assert sorted(int(i) for b in batches for i in b.indices[b.weights > 0]) == [*range(13)]
    assert {images(batch).shape[1:3] for batch in batches} == set(buckets.sizes)


def test_resumes_and_hosts_change_nothing():
    whole = take(11)
    assert_equal(take(4, start=7), whole[7:])
    halves = [take(11, rows=rows) for rows in (range(2), range(2, 4))]
    for step, batch in enumerate(whole):
        for name in ("images", "tokens", "weights", "indices", "epochs"):
            parts = np.concatenate([getattr(half[step], name) for half in halves])
            np.testing.assert_array_equal(parts, getattr(batch, name), name)
