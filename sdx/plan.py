"""python -m sdx.plan: what a configuration needs on its hardware, without that hardware."""

import os
import sys
from collections.abc import Sequence

from sdx.config.cli import run
from sdx.config.command_keys import PlanKeys, Report
from sdx.config.errors import ConfigError, Problem
from sdx.config.schema import Config

FITS, FAILED, REFUSED, DOES_NOT_FIT = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table or a line of JSON; exit code 0, 1 where the compiler failed, 2 refused, 3 when
    it does not fit."""
    return run("plan", sys.argv[1:] if argv is None else argv, plan)


def plan(config: Config, _: list[str], keys: PlanKeys) -> int:
    """Prints what `config` needs; JAX is imported here, after every check that needs none."""
    from sdx.experiment.planning import PlanRefused, make_plan
    from sdx.planning.compiled import CompilationFailed, CompilationRefused
    from sdx.planning.report import render
    from sdx.planning.report_json import to_json
    from sdx.training.program import BatchError

    try:
        _refuse_rehearsal(config)
        found = make_plan(config, compiles=keys.compile, level=keys.optimization_level.name)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except (BatchError, CompilationRefused, PlanRefused) as error:
        print(f"sdx: {error}", file=sys.stderr)
        return REFUSED
    except CompilationFailed as error:
        print(f"sdx: {error}", file=sys.stderr)
        return FAILED
    _show(to_json(found) if keys.report is Report.json else render(found))
    return DOES_NOT_FIT if found.fits == "no" else FITS


def _show(text: str) -> None:
    """Prints it; where nobody reads any more (`| head`), the exit code still tells."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_rehearsal(config: Config) -> None:
    if config.hardware.simulate:
        rule = "sdx.plan is about the hardware itself, which sdx.train rehearses with it"
        raise ConfigError(
            [Problem("hardware.simulate", "true", rule, "use hardware.simulate=false")]
        )


if __name__ == "__main__":
    sys.exit(main())
