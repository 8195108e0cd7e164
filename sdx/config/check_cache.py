"""Rules of the keys that say whether training reads a cache, and which."""

from collections.abc import Callable, Iterator

from sdx.config.errors import Problem
from sdx.config.schema import Cache, Config


def _reads_cache(config: Config) -> bool:
    return config.data.cache is not Cache.none


def _caches_draws(config: Config) -> bool:
    return _reads_cache(config) and _draws(config) is not None


def _draws(config: Config) -> str | None:
    """The setting by which an image looks different every epoch."""
    if config.data.random_flip:
        return "data.random_flip=true"
    return None if config.data.center_crop else "data.center_crop=false"


NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "data.cache_dir": (_reads_cache, "data.cache=moments"),
    "data.cache_views": (
        _caches_draws,
        "data.cache=moments, and data.random_flip=true or data.center_crop=false",
    ),
}


def cache_problems(config: Config) -> Iterator[Problem]:
    """What cannot be cached, and what a cache must be told."""
    data = config.data
    if data.cache is Cache.none:
        return
    if data.cache is Cache.moments_and_context and config.train.text_encoder:
        rule = "its text states would be stale after one step of train.text_encoder=true"
        yield Problem("data.cache", data.cache.name, rule, "use data.cache=moments")
    draws = _draws(config)
    if draws is not None and data.cache_views is None:
        rule = f"missing, {draws} shows each image differently every epoch"
        yield Problem("data.cache_views", "null", rule, "give a number of views, 4 for instance")
    if data.buckets:
        rule = "what is cached is square, data.buckets=true is not"
        yield Problem(
            "data.cache", data.cache.name, rule, "use data.cache=none or data.buckets=false"
        )
    if not data.cache_dir:
        yield Problem("data.cache_dir", "''", "must be a folder")
