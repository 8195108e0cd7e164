"""python -m sdx.planning.compiling CONFIG RESULT LEVEL: the process in which compiled.py compiles.

Writes the report on the saved configuration CONFIG to RESULT; exit code 2, with words in RESULT,
where that is refused.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdx.config.compose import from_saved
from sdx.planning.compiled import to_json

REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with a report in RESULT, 2 with a reason there; else there is no RESULT."""
    saved, result, level = sys.argv[1:] if argv is None else argv
    config = from_saved(Path(saved))
    from sdx.planning.compiler import compile_here
    from sdx.planning.topology import TopologyError

    try:
        text, code = to_json(compile_here(config, level)), 0
    except TopologyError as error:
        text, code = str(error), REFUSED
    Path(result).write_text(text, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
