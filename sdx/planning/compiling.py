"""python -m sdx.planning.compiling CONFIG RESULT LEVEL: the process in which compiled.py compiles.

Writes the report on the saved configuration CONFIG to RESULT; exit code 2, with words in RESULT,
where that is refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdx.config.compose import from_saved
from sdx.config.errors import ConfigError
from sdx.config.schema import Config
from sdx.parallel.xla_flags import set_flags
from sdx.planning.compiled import to_json

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with a report in RESULT, 2 with a reason there; else there is no RESULT."""
    saved, result, level = sys.argv[1:] if argv is None else argv
    text, code = _answer(from_saved(Path(saved)), level)
    Path(result).write_text(text, encoding="utf-8")
    return code


def _answer(config: Config, level: str) -> tuple[str, int]:
    """What goes into RESULT, and the exit code."""
    try:
        set_flags(config.xla, config.hardware, config.run.compilation_cache_dir)
    except ConfigError as error:
        return "\n".join(map(str, error.problems)), REFUSED
    from sdx.planning.compiler import REFUSALS, compile_here  # imports JAX, which reads flags once

    try:
        return to_json(compile_here(config, level)), 0
    except REFUSALS as error:
        return str(error), REFUSED


if __name__ == "__main__":
    sys.exit(main())
