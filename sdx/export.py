"""python -m sdx.export RUN --out FOLDER: a folder that StableDiffusionPipeline loads."""

import argparse
import sys
from collections.abc import Sequence

from sdx.record.store import StoreError, parse_path
from sdx.record.validation import parse_step

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where verification, disk or upload failed; 2 refused, nothing was written."""
    arguments = _parser().parse_args(argv)
    from sdx.experiment.exporting import EXPORT_FAILURES, EXPORT_FAULTS, export  # after --help
    from sdx.experiment.publishing import check_can_publish, publish

    hub_id = arguments.push_to_hub
    try:
        if hub_id is not None:
            check_can_publish(hub_id)
        export(
            arguments.source,
            arguments.out,
            weights=arguments.weights,
            step=arguments.step,
            dtype=arguments.dtype,
            verifies=arguments.verify,
            hub_id=hub_id,
            named=arguments.model,
        )
        print(f"exported: {arguments.out}", flush=True)
        if hub_id is not None:
            address = publish(arguments.out, hub_id, title="Exported by sdx", say=print)
            print(f"uploaded: {address}")
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was exported", INTERRUPTED)
    except StoreError as error:
        return _fail(error, FAILED if error.may_pass else REFUSED)
    except EXPORT_FAULTS as error:
        return _fail(error, REFUSED)
    except EXPORT_FAILURES as error:
        return _fail(error, FAILED)
    return FINISHED


def _fail(error: Exception | str, code: int) -> int:
    print(f"sdx: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sdx.export", description=__doc__)
    parser.add_argument(
        "source", metavar="RUN", help="run, model folder, original .safetensors file or Hub id"
    )
    parser.add_argument(
        "--out",
        type=parse_path,
        required=True,
        metavar="FOLDER",
        help="new, or an earlier export of it",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="averaged or raw (averaged where the run has it)"
    )
    parser.add_argument("--step", type=parse_step, help="that checkpoint, or best (the newest)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="how the weights are stored (float32)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="draw a picture with diffusers and with sdx first; they must be the same",
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload it; the token is that of your login"
    )
    parser.add_argument("--model", help="what an original file is if it does not tell, e.g. sd21")
    return parser


if __name__ == "__main__":
    sys.exit(main())
