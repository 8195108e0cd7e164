"""python -m sdx.train: train, or continue where a run of the same configuration stopped."""

import sys
from collections.abc import Sequence

from sdx.config.cli import run
from sdx.config.schema import Config
from sdx.parallel.rehearsal import is_to_spawn, rehearse, typed
from sdx.parallel.xla_flags import set_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; exit code 0 finished, 1 failed, 2 refused, 75 interrupted."""
    return run("train", sys.argv[1:] if argv is None else argv, train)


def train(config: Config, overrides: list[str]) -> int:
    """Trains what `config` says; JAX is imported here, after every check that needs none."""
    overrides = typed(overrides)
    if is_to_spawn(config):
        return rehearse("train", config, overrides)
    set_flags(config.xla, config.hardware, config.run.compilation_cache_dir)
    from sdx.experiment import run as experiment

    return experiment.run(config, overrides)


if __name__ == "__main__":
    sys.exit(main())
