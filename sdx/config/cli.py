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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdx.config.arguments import Arguments, parse_arguments
from sdx.config.errors import ConfigError, Problem
from sdx.config.folders import CONF, option_folders
from sdx.config.schema import Config

Body = Callable[..., int]
"""(config, overrides), and for a command with root keys of its own (command_keys.py) those as well,
to the exit code."""
Adjust = Callable[[Config], Config]

_REFUSED, _INTERRUPTED, _FAILED, _DOES_NOT_FIT = 2, 75, 1, 3
_PLACES = ("run.name=", "run.output_dir=")  # with these a saved configuration leaves its folder


@dataclass(frozen=True)
class _Job:
    config: Config
    overrides: list[str]


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
        jobs = _jobs(arguments, adjust)
        if own is not None:
            body = partial(_with_own, body, own)
        if arguments.multirun:
            return _sweep(command, arguments, jobs, body, own is not None and own.writes_data)
        return body(jobs[0].config, jobs[0].overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _REFUSED


def _with_own(body: Body, own: Any, config: Config, overrides: list[str]) -> int:
    return body(config, overrides, own)


def _jobs(arguments: Arguments, adjust: Adjust | None) -> list[_Job]:
    """Every job that was asked for, composed and checked; raises ConfigError with all faults of all
    jobs.
    """
    problems = [*arguments.problems]
    jobs: list[_Job] = []
    batches = [arguments.overrides]
    if arguments.multirun:
        batches, faults = _expanded(arguments)
        problems += faults
    if arguments.saved and arguments.multirun:
        problems.append(
            Problem("--from", str(arguments.saved), "cannot be swept", "drop --multirun")
        )
    for overrides in batches:
        try:
            jobs.append(_Job(_config(arguments, overrides, adjust), overrides))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return _with_own_folders(jobs) if arguments.multirun else jobs


def _config(arguments: Arguments, overrides: list[str], adjust: Adjust | None) -> Config:
    from sdx.config.compose import compose, from_saved

    saved = arguments.saved
    if saved is None:
        return compose(overrides, config_dir=arguments.config_dir, adjust=adjust)
    config = from_saved(saved, overrides, adjust=adjust)
    if not saved.is_dir() or any(text.startswith(_PLACES) for text in overrides):
        return config
    folder = saved.resolve()
    place = dataclasses.replace(config.run, name=folder.name, output_dir=str(folder.parent))
    return dataclasses.replace(config, run=place)


def _expanded(arguments: Arguments) -> tuple[list[list[str]], list[Problem]]:
    """The overrides of each job of a sweep, as Hydra's basic sweeper multiplies them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from sdx.config.compose import composing
    from sdx.config.overrides import parse

    parsed = [(text, parse(text)) for text in arguments.overrides]
    problems = [item for _, item in parsed if isinstance(item, Problem)]
    texts = [
        text
        for text, item in parsed
        if not isinstance(item, Problem) and not text.lstrip("+").startswith(("hydra.", "hydra/"))
    ]
    with composing(option_folders(arguments.config_dir)):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        try:
            [batches] = BasicSweeper.split_arguments(parser.parse_overrides(texts), None)
        except HydraException as error:
            return [], [*problems, Problem("--multirun", None, str(error).rstrip("."))]
    return batches, problems


def _with_own_folders(jobs: list[_Job]) -> list[_Job]:
    """Jobs whose run folders differ: a given name becomes a prefix, keys outside the identity a
    suffix. They export nothing at their end unless that, or an upload, is typed.
    """
    from sdx.config.identity import folder_names

    names = folder_names([job.config for job in jobs], [job.overrides for job in jobs])
    return [
        _Job(
            dataclasses.replace(
                job.config,
                run=dataclasses.replace(job.config.run, name=name),
                export=dataclasses.replace(job.config.export, at_end=_exports(job)),
            ),
            job.overrides,
        )
        for job, name in zip(jobs, names, strict=True)
    ]


def _exports(job: _Job) -> bool:
    typed = {text.lstrip("+").partition("=")[0] for text in job.overrides}
    export = job.config.export
    uploads = "export.push_to_hub" in typed and export.push_to_hub
    return export.at_end and ("export.at_end" in typed or uploads)


def _sweep(
    command: str, arguments: Arguments, jobs: list[_Job], body: Body, writes_data: bool
) -> int:
    """All jobs one after the other through Hydra's sweeper; Ctrl-C in one leaves the rest
    unstarted. Where jobs write data, what is said of them goes to standard error.
    """
    from hydra.core.hydra_config import HydraConfig

    codes: list[int] = []

    def job_body(_: object) -> None:
        job = jobs[HydraConfig.get().job.num]
        if _INTERRUPTED in codes:
            return
        said = f"job {len(codes) + 1} of {len(jobs)}: {' '.join(job.overrides)}"
        print(said, flush=True, file=sys.stderr if writes_data else sys.stdout)
        try:
            codes.append(body(job.config, job.overrides))
        except ConfigError as error:
            print(error, file=sys.stderr)
            codes.append(_REFUSED)
        except Exception:
            traceback.print_exc()
            codes.append(_FAILED)

    with tempfile.TemporaryDirectory() as scratch:  # Hydra insists on writing a multirun.yaml
        where = [f"hydra.sweep.dir={scratch}", "hydra.sweep.subdir=."]
        _hydra(
            command, ["--multirun", *arguments.overrides, *where], arguments.config_dir, job_body
        )
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
