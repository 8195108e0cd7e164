"""Rules of data.cache: what cannot be cached, and what a cache must be told."""

import pytest

from sdx.config.check import check, check_given
from sdx.config.identity import identity
from sdx.encode import with_cache
from tests.config.quick import quick

pytestmark = pytest.mark.fast

CACHE = "data.cache=moments"
RULES = {
    "trained text encoder": (
        ["data.cache=moments_and_context", "train.text_encoder=true"],
        "data.cache=moments_and_context: its text states would be stale after one step of"
        " train.text_encoder=true; use data.cache=moments.",
    ),
    "flip without views": (
        [CACHE, "data.random_flip=true"],
        "data.cache_views=null: missing, data.random_flip=true shows each image differently every"
        " epoch; give a number of views, 4 for instance.",
    ),
    "crop without views": (
        [CACHE, "data.center_crop=false"],
        "data.cache_views=null: missing, data.center_crop=false shows each image differently every"
        " epoch; give a number of views, 4 for instance.",
    ),
    "buckets": (
        [CACHE, "data.buckets=true"],
        "data.cache=moments: what is cached is square, data.buckets=true is not; use"
        " data.cache=none or data.buckets=false.",
    ),
    "no folder": ([CACHE, "data.cache_dir=''"], "data.cache_dir='': must be a folder."),
}
IDLE = {
    "views of what is always alike": (
        [CACHE, "data.cache_views=2"],
        "data.cache_views=2: has no effect here; it needs data.cache=moments, and"
        " data.random_flip=true or data.center_crop=false.",
    ),
    "views without a cache": (
        ["data.random_flip=true", "data.cache_views=2"],
        "data.cache_views=2: has no effect here; it needs data.cache=moments, and"
        " data.random_flip=true or data.center_crop=false.",
    ),
    "folder without a cache": (
        ["data.cache_dir=caches"],
        "data.cache_dir=caches: has no effect here; it needs data.cache=moments.",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_told(name: str) -> None:
    overrides, text = RULES[name]
    assert text in [str(problem) for problem in check(quick(overrides))]


@pytest.mark.parametrize("name", IDLE)
def test_a_key_that_does_nothing_is_told(name: str) -> None:
    overrides, text = IDLE[name]
    config, given = quick(overrides), [text.partition("=")[0] for text in overrides]
    assert [str(problem) for problem in check_given(config, given)] == [text]


def test_sound_caches_are_no_problem() -> None:
    for overrides in (
        [CACHE],
        [CACHE, "train.text_encoder=true"],
        ["data.cache=moments_and_context", "data.cache_dir=s3://bucket/caches"],
        [CACHE, "data.random_flip=true", "data.cache_views=1"],
    ):
        config = quick(overrides)
        given = [text.partition("=")[0] for text in overrides]
        assert [*check(config), *check_given(config, given)] == []


def test_a_cache_is_the_same_run_unless_its_views_run_out() -> None:
    flips = ["data.random_flip=true"]
    assert identity(quick([])) == identity(quick([CACHE]))
    assert identity(quick(flips)) != identity(quick([*flips, CACHE, "data.cache_views=2"]))


def test_encode_makes_the_cache_that_is_asked_for() -> None:
    assert with_cache(quick([])).data.cache.name == "moments"
    assert with_cache(quick(["data.cache=moments_and_context"])).data.cache.name == (
        "moments_and_context"
    )
