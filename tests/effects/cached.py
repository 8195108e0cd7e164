"""`data.cache*`: training reads what sdx.encode wrote."""

import io
from contextlib import redirect_stdout
from functools import cache

from sdx.data.source import DataError
from sdx.experiment.encoding import encoding
from sdx.experiment.setup import prepare
from tests.effects.data import batches
from tests.effects.effect import Case, Effect

CACHED = ("data.cache=moments", "data.cache_dir={files}/cache")


@cache
def made(case: Case) -> None:
    """Writes the cache of a case."""
    said = io.StringIO()
    with redirect_stdout(said):
        assert encoding.encode(case.config, case.overrides) == 0, said.getvalue()


def handed_over(case: Case) -> set[str]:
    """What a batch holds of images and captions, beside tokens; the cache is made first."""
    if case.config.data.cache.name != "none":
        made(case)
    [batch] = batches(case, 1, case.setup.source)
    kinds = ("images", "moments", "context")
    return {kind for kind in kinds if getattr(batch, kind) is not None}


def found(case: Case) -> bool:
    """Whether a start finds the cache that `CACHED` makes."""
    made(case.other(CACHED))
    try:
        prepare(case.config)
    except DataError:
        return False
    return True


def num_views(case: Case) -> int:
    """Of each image, in the cache that would be made."""
    views = encoding.prepare(case.config).key.parts["views"]
    assert isinstance(views, int)
    return views


EFFECTS = [
    Effect(
        "data.cache",
        "moments_and_context",
        handed_over,
        {"images"},
        {"moments", "context"},
        along=("data.cache_dir={files}/cache",),
    ),
    Effect(
        "data.cache_dir",
        "{files}/cache",
        found,
        False,
        True,
        given=("data.cache=moments", "data.cache_dir={files}/nowhere"),
    ),
    Effect(
        "data.cache_views",
        "3",
        num_views,
        1,
        3,
        given=("data.cache=moments", "data.random_flip=true", "data.cache_views=1"),
    ),
]
