"""python -m sdx.runs [FOLDER]: what runs and sweeps did; following, comparing and ending them."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from sdx.config.folders import reach_launchers
from sdx.record.redact import said_by
from sdx.record.store import StoreError, parse_path

DONE, FAILED, REFUSED = 0, 1, 2
FOLDER = "outputs, a sweep in it (outputs/sweeps/NAME), a run, or an address of either (outputs)"
ACTS = (
    ("--logs", "the end of each job's log; --follow what is added to it"),
    ("--cancel", "end a run, or all jobs of a sweep; they save what they have"),
    ("--sweep-up", "delete TPUs of yours that no launcher uses"),
    ("--tidy", "delete the copies of code in FOLDER/snapshots, once no job needs them"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a followed run failed or a store did; 2 for what is no run or sweep."""
    reach_launchers()
    arguments = _arguments(argv)
    try:
        return FAILED if _act(arguments) else DONE
    except BrokenPipeError:  # of what is only shown, `| head` has seen enough
        return _unheard()
    except KeyboardInterrupt:
        return _fail("no longer shown; what runs goes on", DONE)
    except StoreError as error:
        return _fail(said_by(error), FAILED if error.may_pass else REFUSED)
    except ValueError as error:
        return _fail(str(error), REFUSED)


def _act(arguments: argparse.Namespace) -> bool:
    """Does the one thing asked for; whether something of it failed."""
    from sdx_launchers.runs import comparison, control  # after --help
    from sdx_launchers.runs.tidy import tidy
    from sdx_launchers.saying import say

    if arguments.compare:
        say(comparison.render(comparison.compare(*arguments.compare)))
        return False
    if arguments.sweep_up:
        return control.sweep_up(say)
    if arguments.tidy:
        say(tidy(arguments.folder.absolute()))
        return False
    watch = control.Watch(arguments.folder.absolute(), arguments.objective)
    if arguments.logs:
        control.show_logs(watch, partial(print, flush=True), follows=arguments.follow)
        return False
    if arguments.cancel:
        control.cancel(watch, say)
        return False
    return control.show(watch, follows=arguments.follow)


def _fail(text: str, code: int) -> int:
    from sdx_launchers.saying import say

    say(f"sdx: {text}", aside=True)
    return code


def _unheard() -> int:
    from sdx_launchers.saying import mute

    mute(sys.stdout)
    return DONE


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    others = arguments.cancel or arguments.sweep_up or arguments.tidy or arguments.compare
    if arguments.follow and others:
        parser.error("argument --follow: stands alone or with --logs; type a second command")
    if arguments.folder is not None and (arguments.sweep_up or arguments.compare):
        parser.error("argument FOLDER: --sweep-up and --compare A B take none")
    arguments.folder = arguments.folder or parse_path("outputs")
    return arguments


def _parser() -> argparse.ArgumentParser:
    from sdx_launchers.sweep.objective import objective_argument

    parser = argparse.ArgumentParser(prog="python -m sdx.runs", description=__doc__)
    parser.add_argument("folder", nargs="?", type=parse_path, metavar="FOLDER", help=FOLDER)
    parser.add_argument("--follow", action="store_true", help="show it until all has ended")
    judged = "what runs are judged by (the sweep's own, else validation_loss:min)"
    parser.add_argument("--objective", type=objective_argument, metavar="METRIC", help=judged)
    acts = parser.add_mutually_exclusive_group()
    for name, help in ACTS:
        acts.add_argument(name, action="store_true", help=help)
    pair = {"nargs": 2, "type": parse_path, "metavar": ("A", "B")}
    acts.add_argument("--compare", **pair, help="two runs side by side: keys, code, metrics")
    return parser


if __name__ == "__main__":
    sys.exit(main())
