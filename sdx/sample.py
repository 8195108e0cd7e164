"""python -m sdx.sample RUN_OR_FOLDER --prompt "...": draw pictures with a trained model."""

import argparse
import sys
from collections.abc import Sequence

from sdx.config.numbers import scale, seed, whole
from sdx.config.schema import SamplerKind
from sdx.record.store import parse_path

FINISHED, REFUSED, INTERRUPTED = 0, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Writes one PNG for each prompt and a grid of all; exit code 0, or 2 for bad input."""
    arguments = _parser().parse_args(argv)
    from sdx.experiment.drawing import DRAWING_FAULTS, draw  # after --help: it imports JAX

    try:
        folder = draw(
            arguments.source,
            arguments.prompt,
            negative_prompt=arguments.negative_prompt,
            num_images=arguments.num_images,
            num_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            sampler=arguments.sampler,
            seed=arguments.seed,
            out=arguments.out,
            model=arguments.model,
        )
    except (KeyboardInterrupt, *DRAWING_FAULTS) as error:
        print(f"sdx: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else REFUSED
    print(f"pictures: {folder}")
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdx.sample", description=__doc__)
    parser.add_argument("source", help="run, RUN@STEP, RUN@best, folder, .safetensors or Hub id")
    parser.add_argument("--prompt", action="append", required=True, help="may be given many times")
    parser.add_argument("--negative-prompt", help="what guidance steers away from (the run's own)")
    parser.add_argument("--num-images", type=whole, default=1, help="pictures of each prompt (1)")
    parser.add_argument("--steps", type=whole, help="sampler steps (the run's own, else 30)")
    parser.add_argument(
        "--guidance", type=scale, help="guidance scale; 1 is off (the run's own, else 7.5)"
    )
    parser.add_argument(
        "--sampler", choices=list(SamplerKind.__members__), help="how it draws (the run's own)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the initial noise (0)")
    parser.add_argument("--out", type=parse_path, help="folder (RUN/samples/drawn, or samples)")
    parser.add_argument("--model", help="what an original file is if it does not tell, e.g. sd21")
    return parser


if __name__ == "__main__":
    sys.exit(main())
