"""The way from a command line to a checked `Config`, shared by the commands that compose one.

A command is its name and a body; everything before the body (help, errors, saved configurations,
sweeps) is here, and none of it imports JAX. Exit codes: what the body returns; 2 for a
configuration that must not run; of a sweep 1 if a job failed, else 75 if one was interrupted, else
3 if one does not fit, else 0.
"""

import dataclasses
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdx.config.arguments import Arguments, parse_arguments
from sdx.config.errors import ConfigError, Problem
from sdx.config.folders import CONF, option_folders
from sdx.config.schema import Config

if TYPE_CHECKING:  # they bring Hydra, which --help and saved configurations need not wait for
    from sdx.config.sweeping import SweepRequest, SweptJob

Body = Callable[..., int]
"""(config, overrides), and for a command with root keys of its own (command_keys.py) those as well,
to the exit code."""
Adjust = Callable[[Config], Config]

_LAUNCHED = ("train", "encode")  # commands whose jobs of a sweep are processes of their own
_REFUSED, _INTERRUPTED, _FAILED, _DOES_NOT_FIT = 2, 75, 1, 3
_PLACES = ("run.name=", "run.output_dir=")  # with these a saved configuration leaves its folder


def run(command: str, argv: Sequence[str], body: Body, *, adjust: Adjust | None = None) -> int:
    """Compose and check what `argv` asks for, then run `body(config, overrides)`; returns the exit
    code. `adjust` is what the command makes of a composed configuration before it is checked. A
    `body` that raises ConfigError has started nothing.
    """
    from sdx.config.command_keys import take

    arguments = parse_arguments(argv)
    arguments.overrides, own, problems = take(command, arguments.overrides)
    arguments.problems += problems
    if arguments.wants_help:
        from sdx.config.help import page

        print(page(command, arguments.config_dir))
        return 0
    try:
        if arguments.hydra_switches:
            _show(command, arguments)
            return 0
        if own is not None:
            body = partial(_with_own, body, own)
        if arguments.saved is not None:
            config = _saved(arguments, adjust)
            return body(config, arguments.overrides)
        from sdx.config.sweeping import read_request

        asked = read_request(command, arguments, adjust)
        if isinstance(asked, Config):
            return body(asked, arguments.overrides)
        if command in _LAUNCHED:
            return _launch(asked, arguments.config_dir)
        return _run_here(asked.jobs, body, own is not None and own.writes_data)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _REFUSED


def _with_own(body: Body, own: Any, config: Config, overrides: list[str]) -> int:
    return body(config, overrides, own)


def _saved(arguments: Arguments, adjust: Adjust | None) -> Config:
    """The saved configuration with overrides on top, in the folder it was saved in."""
    from sdx.config.compose import from_saved
    from sdx.config.hydra_keys import without_effect

    saved, overrides = arguments.saved, arguments.overrides
    assert saved is not None
    rule, fix = "with --from, which starts one run here", "leave it out"
    problems = [*arguments.problems, *without_effect(overrides, rule, fix)]
    if arguments.multirun:
        fix = "drop --multirun"
        problems.append(Problem("--from", str(saved), "cannot be swept", fix))
    try:
        config = from_saved(saved, overrides, adjust=adjust)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    if not saved.is_dir() or any(text.startswith(_PLACES) for text in overrides):
        return config
    folder = saved.resolve()
    place = dataclasses.replace(config.run, name=folder.name, output_dir=str(folder.parent))
    return dataclasses.replace(config, run=place)


def _launch(request: "SweepRequest", config_dir: Path | None) -> int:
    """The sweep, by the sweeper and the launcher that Hydra finds."""
    from sdx.config.hydra_keys import for_hydra

    def task(_: object) -> None:
        raise AssertionError("jobs are processes of their own")

    vars(task)["request"] = request  # for the plugins, which Hydra hands the task to
    with tempfile.TemporaryDirectory() as scratch:  # Hydra insists on writing a multirun.yaml
        quoted = scratch.replace("'", "\\'")
        where = [f"hydra.sweep.dir='{quoted}'", "hydra.sweep.subdir=."]
        overrides = [for_hydra(text) for text in request.overrides]
        _hydra(request.command, ["--multirun", *overrides, *where], config_dir, task)
    return request.exit_code


def _run_here(jobs: Sequence["SweptJob"], body: Body, writes_data: bool) -> int:
    """All jobs one after the other in this process; Ctrl-C in one leaves the rest unstarted. Where
    jobs write data, what is said of them goes to standard error.
    """
    codes: list[int] = []
    for number, job in enumerate(jobs, start=1):
        said = f"job {number} of {len(jobs)}: {' '.join(job.overrides)}"
        print(said, flush=True, file=sys.stderr if writes_data else sys.stdout)
        try:
            codes.append(body(job.config, job.overrides))
        except ConfigError as error:
            print(error, file=sys.stderr)
            codes.append(_REFUSED)
        except Exception:
            traceback.print_exc()
            codes.append(_FAILED)
        if codes[-1] == _INTERRUPTED:
            break
    return exit_code(codes)


def exit_code(codes: Sequence[int]) -> int:
    """The exit code of a sweep whose jobs ended with `codes`."""
    if any(code not in {0, _INTERRUPTED, _DOES_NOT_FIT} for code in codes):
        return _FAILED
    return next((code for code in (_INTERRUPTED, _DOES_NOT_FIT) if code in codes), 0)


def _show(command: str, arguments: Arguments) -> None:
    """Hydra's own answers (`--cfg`, `--info`, completion), once the overrides are found sound."""
    overrides = arguments.overrides
    if not any(switch in arguments.hydra_switches for switch in ("--shell-completion", "-sc")):
        from sdx.config.overrides import inspect

        inspected = inspect(overrides, option_folders(arguments.config_dir))
        problems = [*arguments.problems, *_not_shown(arguments.saved), *inspected.problems]
        if problems:
            raise ConfigError(problems)
        overrides = inspected.sound
    switches = [*arguments.hydra_switches, *overrides]
    _hydra(command, switches, arguments.config_dir, lambda _: None)


def _not_shown(saved: Path | None) -> list[Problem]:
    """Hydra shows what it composes, which a saved configuration is not."""
    if saved is None:
        return []
    fix = "it is a file to read as it is, or run it without --cfg and --info"
    return [Problem("--from", str(saved), "a saved configuration cannot be shown", fix)]


def _hydra(
    command: str, argv: list[str], config_dir: Path | None, task: Callable[[object], None]
) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sdx.config.compose import register, search_path
    from sdx.config.overrides import explain

    register()
    argv = [*argv, *search_path(option_folders(config_dir))]
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)
    with _process_state([f"sdx-{command}", *argv]):
        try:
            main()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([explain(error)]) from None


@contextmanager
def _process_state(argv: list[str]) -> Iterator[None]:
    """What Hydra reads: `sys.argv`, and HYDRA_FULL_ERROR, which makes it raise its errors."""
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]
