"""The procedural shapes data set."""

import time

import numpy as np
import pytest

from sdx.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Attributes,
    ShapesSource,
    combinations,
    cover,
    draw,
    held_out_prompts,
    parse_caption,
)

pytestmark = pytest.mark.fast


def test_an_example_depends_on_its_index_alone() -> None:
    a, b = ShapesSource(100, 64), ShapesSource(1000, 64)
    assert np.array_equal(a[7].pixels, b[7].pixels)
    assert a[7].captions == b[7].captions
    assert not np.array_equal(a[7].pixels, a[8].pixels)
    assert a[7].pixels.shape == (64, 64, 3)
    assert len(a) == 100
    with pytest.raises(IndexError):
        a[100]


def test_fingerprint_tells_sources_apart() -> None:
    sources = [ShapesSource(10, 64), ShapesSource(11, 64), ShapesSource(10, 32)]
    sources.append(ShapesSource(10, 64, "validation"))
    assert len({source.fingerprint for source in sources}) == 4
    assert ShapesSource(10, 64).fingerprint == sources[0].fingerprint


def test_captions_read_as_promised_and_parse_back() -> None:
    attributes = Attributes("small", "red", "circle", "blue")
    assert attributes.caption == "a small red circle on a blue background"
    assert parse_caption(attributes.caption) == attributes
    assert parse_caption("a small blue circle on a blue background") is None
    assert parse_caption("a photo of yoda") is None


def test_train_never_shows_a_held_out_combination() -> None:
    train, validation = combinations("train"), combinations("validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 2 * 4 * (8 * 6 - 3)
    triples = [{(c.shape, c.colour, c.background) for c in split} for split in (train, validation)]
    assert not triples[0] & triples[1]
    held_out = {c.caption for c in validation}
    source = ShapesSource(3000, 16)
    assert not any(source[i].captions[0] in held_out for i in range(3000))
    with pytest.raises(ValueError, match="train and validation"):
        combinations("test")


def test_every_value_is_common_in_both_splits() -> None:
    for split, least in (("train", 0.09), ("validation", 0.06)):
        shown = combinations(split)
        for field, values in (
            ("size", SIZES),
            ("colour", COLOURS),
            ("shape", SHAPES),
            ("background", BACKGROUNDS),
        ):
            for value in values:
                assert sum(getattr(c, field) == value for c in shown) / len(shown) > least


def test_held_out_prompts_cover_the_validation_split_evenly() -> None:
    prompts = held_out_prompts(200)
    held_out = {c.caption for c in combinations("validation")}
    assert len(prompts) == 200
    assert set(prompts) == held_out
    assert prompts == held_out_prompts(300)[:200]


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_where_they_are_put(shape: str) -> None:
    coverage = cover(shape, 0.2, (0.25, 0.75), 64)
    rows, columns = np.mgrid[0:64, 0:64]
    assert abs((coverage * columns).sum() / coverage.sum() + 0.5 - 16) < 0.5
    assert abs((coverage * rows).sum() / coverage.sum() + 0.5 - 48) < 3.5
    assert coverage.min() == 0
    assert coverage.max() == 1
    area = coverage.sum() / 64**2 / 0.2**2
    known = {"circle": np.pi, "square": 1.9**2, "triangle": 0.75 * 3**0.5 * 1.25**2}
    assert area == pytest.approx(known.get(shape, 2.14), rel=0.02)


def test_edges_are_smooth_and_insides_pure() -> None:
    image = draw(Attributes("large", "red", "circle", "white"), 0.35, (0.5, 0.5), 64)
    assert tuple(image[32, 32]) == COLOURS["red"]
    assert tuple(image[0, 0]) == BACKGROUNDS["white"]
    assert len(np.unique(image[..., 0])) > 10


def test_shapes_stay_inside_the_picture() -> None:
    source = ShapesSource(500, 64)
    for i in range(500):
        image = source[i].pixels
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()


def test_drawing_is_fast_enough_for_two_cores() -> None:
    source = ShapesSource(1000, 64)
    begin = time.process_time()
    for i in range(500):
        source[i]
    assert 500 / (time.process_time() - begin) > 1500
