"""python -m sdx.encode: encode the images once, and train from what was encoded."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from sdx.config.cli import run
from sdx.config.schema import Cache, Config
from sdx.parallel.rehearsal import is_to_spawn, rehearse, typed
from sdx.parallel.xla_flags import set_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; exit code 0 complete, 1 failed, 2 refused, 75 interrupted."""
    return run("encode", sys.argv[1:] if argv is None else argv, encode, adjust=with_cache)


def with_cache(config: Config) -> Config:
    """`config` with the cache that is made where none is asked for."""
    if config.data.cache is not Cache.none:
        return config
    return replace(config, data=replace(config.data, cache=Cache.moments))


def encode(config: Config, overrides: list[str]) -> int:
    """Makes the cache; JAX is imported here, after every check that needs none."""
    overrides = typed(overrides)
    if is_to_spawn(config):
        return rehearse("encode", config, overrides)
    set_flags(config.xla, config.hardware, config.run.compilation_cache_dir)
    from sdx.experiment.encoding import encoding

    return encoding.encode(config, overrides)


if __name__ == "__main__":
    sys.exit(main())
