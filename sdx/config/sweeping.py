"""What a command line asks a sweep for: its jobs, each composed and checked, or all faults at once.

Here it ends as data, a `SweepRequest`; running it is the affair of sdx_launchers, which Hydra finds
by `hydra/sweeper` and `hydra/launcher`.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.types import RunMode

from sdx.config.arguments import Arguments
from sdx.config.compose import Adjust, Composed, compose, compose_with_hydra
from sdx.config.errors import ConfigError, Problem
from sdx.config.expansion import expand
from sdx.config.hydra_keys import (
    fixed,
    is_choice,
    is_key,
    judge,
    judge_choices,
    sweeper_settings,
    without_effect,
)
from sdx.config.identity import folder_names
from sdx.config.overrides import parse
from sdx.config.schema import Config

_HYDRA = re.compile(r"[+~]*hydra[./]")


@dataclass(frozen=True)
class SweptJob:
    """A configuration with the folder name of its own, and what was typed for it."""

    config: Config
    overrides: list[str]


@dataclass
class SweepRequest:
    """A sweep as typed: `overrides` are all of them, Hydra's keys included.

    `jobs` is empty where the sweeper chooses values by itself; it makes jobs by `compose`. Whoever
    runs the sweep leaves its exit code here.
    """

    command: str
    overrides: list[str]
    jobs: list[SweptJob]
    compose: Callable[[Sequence[Sequence[str]]], list[SweptJob]]
    """Overrides of some jobs to the jobs, checked; ConfigError with the faults of all."""
    exit_code: int = 0


def read_request(
    command: str, arguments: Arguments, adjust: Adjust | None = None
) -> Config | SweepRequest:
    """The configuration that was asked for, or the sweep: with --multirun, or where an option of
    run_on or sweep implies it. Raises ConfigError with all faults of all jobs."""
    overrides, problems = fixed(arguments.overrides)
    problems = [*arguments.problems, *problems]
    swept = [text for text in overrides if _is_swept(text)]
    whole = compose_with_hydra(
        [text for text in overrides if text not in swept and not is_key(text)],
        config_dir=arguments.config_dir,
        adjust=adjust,
    )
    keys = [text for text in overrides if is_key(text)]
    hydra = whole.hydra
    if not arguments.multirun and (hydra is None or hydra.mode is not RunMode.MULTIRUN):
        return _single(whole, swept, [*problems, *without_effect(overrides)], arguments, adjust)
    if hydra is None:
        raise ConfigError([*problems, *whole.problems])
    choices = {kind: hydra.runtime.choices[f"hydra/{kind}"] for kind in ("sweeper", "launcher")}
    faults = [*judge_choices(choices), *judge(keys, choices)]
    problems += faults
    settings = None if faults else sweeper_settings(hydra, keys, choices)
    own = [text for text in overrides if not is_of_hydra(text)]

    def composed(batches: Sequence[Sequence[str]]) -> list[SweptJob]:
        return compose_jobs(batches, arguments.config_dir, adjust)

    jobs: list[SweptJob] = []
    if settings is None or choices["sweeper"] != "sdx":
        problems += whole.problems
    else:
        batches, faults = expand(settings.params, own, settings.zip)
        problems += faults
        try:
            jobs = composed(batches)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return SweepRequest(command, arguments.overrides, jobs, composed)


def _single(
    whole: Composed,
    swept: Sequence[str],
    problems: Sequence[Problem],
    arguments: Arguments,
    adjust: Adjust | None,
) -> Config:
    if swept:  # said with the other faults, in the order typed
        rest = [text for text in arguments.overrides if not (is_key(text) or is_choice(text))]
        whole = compose_with_hydra(rest, config_dir=arguments.config_dir, adjust=adjust)
    problems = [*problems, *whole.problems]
    if problems or whole.config is None:
        raise ConfigError(problems)
    return whole.config


def _is_swept(text: str) -> bool:
    override = parse(text)
    return isinstance(override, Override) and override.is_sweep_override()


def is_of_hydra(text: str) -> bool:
    """Whether an override is of Hydra's own configuration."""
    return _HYDRA.match(text) is not None


def compose_jobs(
    batches: Sequence[Sequence[str]], config_dir: Path | None, adjust: Adjust | None
) -> list[SweptJob]:
    """A job for each batch of overrides; raises ConfigError with all faults of all jobs."""
    problems: list[Problem] = []
    jobs: list[SweptJob] = []
    for overrides in batches:
        try:
            config = compose(overrides, config_dir=config_dir, adjust=adjust)
            jobs.append(SweptJob(config, list(overrides)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    jobs = _with_own_folders(jobs)
    names = [job.config.run.name for job in jobs]
    for job in jobs:
        if names.count(job.config.run.name) > 1:
            rule = "two jobs of the sweep are the same run"
            problems.append(Problem(" ".join(job.overrides), None, rule, "give each value once"))
    if problems:
        raise ConfigError(problems)
    return jobs


def _with_own_folders(jobs: list[SweptJob]) -> list[SweptJob]:
    """Jobs whose run folders differ: a given name becomes a prefix, keys outside the identity a
    suffix. They export nothing at their end unless that, or an upload, is typed.
    """
    names = folder_names([job.config for job in jobs], [job.overrides for job in jobs])
    return [
        SweptJob(
            dataclasses.replace(
                job.config,
                run=dataclasses.replace(job.config.run, name=name),
                export=dataclasses.replace(job.config.export, at_end=_exports(job)),
            ),
            job.overrides,
        )
        for job, name in zip(jobs, names, strict=True)
    ]


def _exports(job: SweptJob) -> bool:
    typed = {text.lstrip("+").partition("=")[0] for text in job.overrides}
    export = job.config.export
    uploads = "export.push_to_hub" in typed and export.push_to_hub
    return export.at_end and ("export.at_end" in typed or uploads)
