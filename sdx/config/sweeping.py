"""What a command line asks a sweep for: its jobs, each composed and checked, or all faults at once.

Here it ends as data, a `SweepRequest`; running it is the affair of sdx_launchers, which Hydra finds
by `hydra/sweeper` and `hydra/launcher`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override
from hydra.types import RunMode

from sdx.config.arguments import Arguments
from sdx.config.compose import Adjust, Composed, compose_with_hydra
from sdx.config.errors import ConfigError, Problem
from sdx.config.expansion import expand
from sdx.config.hydra_keys import (
    GRID,
    choices_of,
    fixed,
    is_choice,
    is_key,
    judge,
    judge_launcher,
    known_choices,
    sweeper_settings,
    without_effect,
)
from sdx.config.identity import folder_names
from sdx.config.overrides import parse
from sdx.config.places import place_problems
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
    texts, problems = fixed(arguments.overrides)
    keys = [text for text in texts if is_key(text)]
    texts, bad_choices = known_choices([text for text in texts if not is_key(text)])
    swept = [text for text in texts if _is_swept(text)]

    def composed(overrides: Sequence[str]) -> Composed:
        return compose_with_hydra(overrides, config_dir=arguments.config_dir, adjust=adjust)

    whole = composed([text for text in texts if text not in swept])
    problems = [*arguments.problems, *problems]
    if not (arguments.multirun or _implies_sweep(whole)):
        problems += without_effect(arguments.overrides)
        own = [text for text in texts if not is_choice(text)]
        return _single(composed(own) if own != texts or swept else whole, problems)
    problems += bad_choices
    if whole.hydra is None:
        raise ConfigError([*problems, *whole.problems])
    choices = choices_of(whole.hydra)
    faults = [*judge_launcher(choices), *judge(keys, choices)]
    problems += faults
    settings = None if faults else sweeper_settings(whole.hydra, keys, choices)
    own = [text for text in texts if not is_of_hydra(text)]

    def jobs_of(batches: Sequence[Sequence[str]]) -> list[SweptJob]:
        return _jobs([(list(batch), composed(batch)) for batch in batches])

    jobs: list[SweptJob] = []
    if settings is not None and choices["sweeper"] == GRID:
        batches, faults = expand(settings.params, own, settings.zip)
        problems += faults
        try:
            jobs = jobs_of(batches)
        except ConfigError as error:
            problems += error.problems
    else:
        problems += whole.problems
    if problems:
        raise ConfigError(problems)
    return SweepRequest(command, arguments.overrides, jobs, jobs_of)


def _implies_sweep(whole: Composed) -> bool:
    return whole.hydra is not None and whole.hydra.mode is RunMode.MULTIRUN


def _single(whole: Composed, problems: Sequence[Problem]) -> Config:
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


def _jobs(composed: Sequence[tuple[list[str], Composed]]) -> list[SweptJob]:
    """A job for each batch of overrides with what it came to; raises ConfigError with the faults of
    all."""
    problems = [problem for _, whole in composed for problem in whole.problems]
    problems += place_problems([whole for _, whole in composed])
    jobs = [SweptJob(whole.config, texts) for texts, whole in composed if whole.config is not None]
    if problems or len(jobs) < len(composed):
        raise ConfigError(problems)
    jobs = _with_own_folders(jobs)
    count = Counter(job.config.run.name for job in jobs)
    if twice := [job for job in jobs if count[job.config.run.name] > 1]:
        rule = "two jobs of the sweep are the same run"
        raise ConfigError(
            Problem(" ".join(job.overrides), None, rule, "give each value once") for job in twice
        )
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
