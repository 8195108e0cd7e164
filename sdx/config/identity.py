"""Which run this is: a hash of the mathematics of a configuration, and what a change means.

Two configurations with the same identity train the same weights up to floating-point order; limits
(`max_steps`), mesh, hardware, kernels, cadences and sinks are not part of it. A key that stands at
its schema default is left out of the hash, so a key added later changes no identity.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdx.config import resolve
from sdx.config.check import has_effect
from sdx.config.leaves import flatten, leaves, spelled
from sdx.config.schema import Config, OnResume

_MOST_SUFFIX_BYTES = 120  # of a folder's name, which file systems end at 255


@dataclass(frozen=True)
class Difference:
    """A key that changed between the saved configuration of a run and the one it is given."""

    path: str
    old: Any
    new: Any
    on_resume: OnResume

    def __str__(self) -> str:
        return f"{self.path}: {spelled(self.old)} -> {spelled(self.new)}"


def identity(config: Config, num_devices: int | None = None) -> str:
    """Eight hex digits of the hash of the effective mathematics.

    `num_devices` is what the machine has, for presets that do not say. Raises ValueError where the
    global batch is unknown.
    """
    config = resolve.with_global_batch(config, num_devices)
    decides = {
        path: value
        for path, value in _effective(config).items()
        if leaves()[path].identity and value != _plain_default(path)
    }
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_folder_name(config: Config, num_devices: int | None = None) -> str:
    """Name of the run's folder: `run.name`, or model, data and identity."""
    if config.run.name is not None:
        return config.run.name
    return f"{config.model.name}-{config.data.kind.name}-{identity(config, num_devices)}"


def folder_names(configs: Sequence[Config], overrides: Sequence[Sequence[str]]) -> list[str]:
    """Folder names of the jobs of a sweep, all different.

    A given `run.name` is a prefix before the identity; where two jobs are the same run
    mathematically (a swept cadence, say) the overrides that tell them apart follow.
    """
    names = []
    for config in configs:
        plain = dataclasses.replace(config, run=dataclasses.replace(config.run, name=None))
        name = run_folder_name(plain, num_devices=config.hardware.num_devices or 1)
        names.append(name if config.run.name is None else f"{config.run.name}-{name[-8:]}")
    for name in {name for name in names if names.count(name) > 1}:
        alike = [index for index, other in enumerate(names) if other == name]
        shared = set.intersection(*(set(overrides[index]) for index in alike))
        for index in alike:
            own = [text for text in overrides[index] if text not in shared]
            suffix = "-".join(re.sub(r"[^\w.=+]+", "_", text) for text in own)
            if len(os.fsencode(suffix)) > _MOST_SUFFIX_BYTES:
                suffix = hashlib.sha256("\n".join(own).encode()).hexdigest()[:8]
            names[index] = f"{name}-{suffix}" if own else name
    return names


def differences(old: Config, new: Config) -> list[Difference]:
    """Keys whose effective value differs, in schema order, and what that means on a resume."""
    before, after = _effective(old), _effective(new)
    return [
        Difference(path, before.get(path), after.get(path), leaf.on_resume)
        for path, leaf in leaves().items()
        if before.get(path) != after.get(path) and path not in _RESOLVED_ELSEWHERE
    ]


# Keys that only say how another key came about; the other key is compared.
_RESOLVED_ELSEWHERE = {"lr_schedule.warmup_fraction", "schema_version"}


def _effective(config: Config) -> dict[str, Any]:
    """Values by path, derived ones filled in and those without effect left out."""
    values = {path: value for path, value in flatten(config).items() if has_effect(config, path)}
    values["data.resolution"] = resolve.resolution(config)
    values["diffusion.prediction_type"] = resolve.prediction_type(config).name
    values["train.global_batch_size"] = _known_batch(config)
    del values["model.resolution"], values["model.prediction_type"]
    if values.get("data.dir") is not None:  # one folder, however it is spelt
        values["data.dir"] = os.path.normpath(values["data.dir"])
    return values | _effective_schedule(config, values)


def _effective_schedule(config: Config, values: dict[str, Any]) -> dict[str, Any]:
    """The schedule in steps: `decay_steps` where the rate decays, `warmup_steps` if it warms up."""
    values.pop("lr_schedule.warmup_fraction", None)
    values.pop("lr_schedule.decay_steps", None)
    schedule = config.lr_schedule
    decays = schedule.kind in resolve.DECAYING
    warms_up = has_effect(config, "lr_schedule.warmup_steps")
    if not decays and not warms_up:
        return {}
    limit = _known_steps(config)
    if limit is None and schedule.decay_steps is None:  # the data decides how long an epoch is
        fraction = {"lr_schedule.warmup_fraction": schedule.warmup_fraction} if warms_up else {}
        return {"lr_schedule.decay_steps": f"{config.train.epochs} epochs"} | fraction
    steps = {"lr_schedule.warmup_steps": resolve.warmup_steps(config, limit or 0) or None}
    if decays:
        steps["lr_schedule.decay_steps"] = resolve.decay_steps(config, limit or 0)
    return steps


def _known_steps(config: Config) -> int | None:
    """`train.max_steps`, or what the epochs of a source of known size come to."""
    examples = resolve.num_examples(config)
    if config.train.max_steps is not None:
        return config.train.max_steps
    if examples is None or config.train.epochs is None or _known_batch(config) is None:
        return None
    return resolve.max_steps(config, examples)


def _known_batch(config: Config) -> int | None:
    try:
        return resolve.global_batch_size(config)
    except ValueError:
        return None


def _plain_default(path: str) -> Any:
    default = leaves()[path].default
    return getattr(default, "name", default)
