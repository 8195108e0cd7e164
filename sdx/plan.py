"""python -m sdx.plan: what a configuration needs on its hardware, without that hardware."""

import sys
from collections.abc import Sequence

from sdx.config.cli import run
from sdx.config.command_keys import PlanKeys
from sdx.config.errors import ConfigError
from sdx.config.schema import Config

FITS_SO_FAR, REFUSED, DOES_NOT_FIT = 0, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table; exit code 0, 2 refused, 3 when it does not fit."""
    return run("plan", sys.argv[1:] if argv is None else argv, plan)


def plan(config: Config, _: list[str], keys: PlanKeys) -> int:
    """Prints what `config` needs; JAX is imported here, after every check that needs none."""
    from sdx.parallel.mesh import MeshError
    from sdx.planning.estimate import PlanError, estimate
    from sdx.planning.report import render
    from sdx.training.program import BatchError

    try:
        found = estimate(config)
    except (ConfigError, MeshError, BatchError, PlanError) as error:
        print(error if isinstance(error, ConfigError) else f"sdx: {error}", file=sys.stderr)
        return REFUSED
    print(render(found))
    return DOES_NOT_FIT if found.fits == "no" else FITS_SO_FAR


if __name__ == "__main__":
    sys.exit(main())
