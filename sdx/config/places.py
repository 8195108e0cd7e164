"""Where the jobs of a sweep run: in one place, that their hardware is in."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdx.config.compose import Composed, compose
from sdx.config.errors import Problem
from sdx.config.folders import option_folders

_BY_FILE = ("launcher", "sweeper")


def place_problems(jobs: Sequence[Composed]) -> Iterator[Problem]:
    """What is wrong with the places that options chose for these jobs, which compose otherwise."""
    known = [job for job in jobs if job.hydra is not None]
    for kind in _BY_FILE:
        found = {str(_plain(job.hydra, kind)): job for job in known}
        if len(found) > 1:
            rule = "an option that is swept over sets it, and it is one for all jobs"
            yield Problem(f"hydra.{kind}", None, rule, "type a command for each")
    for job in known:
        yield from _clash(job)


def _plain(hydra: DictConfig | None, kind: str) -> object:
    assert hydra is not None
    return OmegaConf.to_container(hydra[kind])


def _clash(job: Composed) -> Iterator[Problem]:
    """Hardware of another kind than the place has."""
    if job.hydra is None or job.config is None:
        return
    choices = job.hydra.runtime.choices
    place, got = choices["run_on"], job.config.hardware
    brings = _hardware_of(place)
    if brings is None or brings == choices["hardware"]:
        return
    kind = _device_kind(brings)
    if got.device_kind != kind:
        rule = f"run_on={place} has {kind} (hardware={brings})"
        yield Problem("hardware", choices["hardware"], rule, "leave it out, or another run_on")


def _hardware_of(place: str) -> str | None:
    """The option of hardware that an option of run_on brings."""
    for folder in option_folders():
        file = folder / "run_on" / f"{place}.yaml"
        if file.is_file():
            return _brought(file)
    return None


def _brought(file: Path) -> str | None:
    node = OmegaConf.to_container(OmegaConf.load(file))
    entries = node.get("defaults", []) if isinstance(node, dict) else []
    chosen = [entry for entry in entries if isinstance(entry, dict)]
    return next(
        (entry["override /hardware"] for entry in chosen if "override /hardware" in entry), None
    )


@cache
def _device_kind(option: str) -> str | None:
    return compose([f"hardware={option}"]).hardware.device_kind
