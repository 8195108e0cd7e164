"""python -m sdx.evaluate RUN_OR_FOLDER: validation loss, FID and CLIP score."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sdx.config.numbers import scale, seed, whole
from sdx.config.schema import SamplerKind
from sdx.record.validation import parse_step

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
PATHS = (
    ("--fid", "REFERENCE", "folder of real pictures, or .npz with mu and sigma of them"),
    ("--inception", "FILE", "FID's network: pt_inception-2015-12-05-….pth or .safetensors of it"),
    ("--save-statistics", "FILE", "write mu and sigma of the pictures (.npz)"),
    ("--clip", "FOLDER", "CLIP score, by a CLIPModel in transformers' layout"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was found; exit code 0, 2 for bad input, 1 where disk or store failed."""
    arguments = vars(_parser().parse_args(argv))
    from sdx.experiment.evaluation import evaluating  # after --help: it imports JAX
    from sdx.experiment.evaluation.request import Request
    from sdx.experiment.evaluation.table import table

    wants_json = arguments.pop("json")
    try:
        row = evaluating.evaluate(
            Request(**arguments), say=partial(print, file=sys.stderr, flush=True)
        )
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on with the pictures missing", INTERRUPTED)
    except evaluating.EVALUATION_FAULTS as error:
        return _fail(error, REFUSED)
    except evaluating.EVALUATION_FAILURES as error:
        return _fail(error, FAILED)
    print(json.dumps(row, ensure_ascii=False) if wants_json else table(row))
    return FINISHED


def _fail(error: Exception | str, code: int) -> int:
    print(f"sdx: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdx.evaluate", description=__doc__)
    parser.add_argument("source", help="run, RUN@STEP, pictures, model folder, file or Hub id")
    parser.add_argument("--step", type=parse_step, help="of which checkpoint, or best (the newest)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="averaged or raw (the run's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch-size", type=whole, help="pictures at once (8 a device)")
    loss = parser.add_argument_group("validation loss of a run, without the options below")
    loss.add_argument("--split", help="held-out split, or a part of one (eval.split)")
    loss.add_argument("--num-batches", type=whole, help="global batches of it (eval.num_batches)")
    score = parser.add_argument_group("scores of pictures")
    for name, metavar, help in PATHS:
        score.add_argument(name, type=Path, metavar=metavar, help=help)
    score.add_argument("--adherence", type=whole, metavar="N", help="data=shapes: judge N pictures")
    draw = parser.add_argument_group("pictures that a run or model draws for its scores")
    draw.add_argument("--prompts", type=Path, help="text, one a line, or captioned pictures")
    draw.add_argument("--out", type=Path, help="folder, gone on with (RUN/samples/evaluation-…)")
    draw.add_argument("--steps", type=whole, help="sampler steps (the run's own, else 30)")
    draw.add_argument("--guidance", type=scale, help="1 is off (the run's own, else 7.5)")
    draw.add_argument("--negative-prompt", help="what guidance steers away from (the run's own)")
    draw.add_argument("--dtype", choices=("float32", "bfloat16"), help="computed in (float32)")
    draw.add_argument("--sampler", choices=list(SamplerKind.__members__), help="the run's own")
    draw.add_argument("--seed", type=seed, help="seed of the initial noise (the run's own, else 0)")
    draw.add_argument("--model", help="what an original file is if it does not tell, e.g. sd21")
    return parser


if __name__ == "__main__":
    sys.exit(main())
