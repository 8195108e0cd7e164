"""The plan of one configuration: estimate, compilation where asked for, advice."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from sdx.config.schema import Config
from sdx.experiment.adopt import adopt
from sdx.experiment.setup import open_weights
from sdx.planning.advice import advise, smallest_bytes
from sdx.planning.compiled import compile_program
from sdx.planning.estimate import SHOWN_SIDES, at_side, estimate
from sdx.planning.verdict import Plan, combined
from sdx.weights.errors import WeightsError


class PlanRefused(ValueError):
    """The files that the configuration is to be taken from cannot be read."""


def make_plan(config: Config, *, compiles: bool, level: str) -> Plan:
    """What `config` needs on hardware that need not be here; `level` is XLA's.

    Raises ConfigError, BatchError or PlanRefused for what cannot be planned, CompilationRefused and
    CompilationFailed where `compiles` and it cannot be compiled.
    """
    config, notes = _as_files_say(config)
    found = estimate(config, level)
    compiled = compile_program(config, level) if compiles else None
    advice = () if combined(found, compiled) == "yes" else tuple(advise(found))
    stuck = found.usable_bytes is not None and found.fits != "yes" and not advice
    return Plan(
        estimate=found,
        compiled=compiled,
        advice=advice,
        smallest_bytes=smallest_bytes(found) if stuck else None,
        others=tuple(at_side(found, side) for side in SHOWN_SIDES if (side, side) != found.image),
        notes=tuple(notes),
    )


def _as_files_say(config: Config) -> tuple[Config, list[str]]:
    """`config` with the architecture of the model's files where they are here."""
    if not config.model.from_files:
        return config, []
    place = Path(config.model.pretrained).expanduser()
    if not place.exists():
        return config, [
            f"model.from_files=true: {config.model.pretrained} is not here, so that this is what "
            f"model={config.model.name} says"
        ]
    try:
        weights, unet = open_weights(config.model)
        with redirect_stdout(sys.stderr):  # what the files changed; standard output is the plan's
            return adopt(config, weights, unet), []
    except WeightsError as error:
        raise PlanRefused(str(error)) from None
