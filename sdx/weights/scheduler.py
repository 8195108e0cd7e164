"""scheduler_config.json: read as a noise schedule and a sampler, and written from them.

A key that a file leaves out has the default of the class it names; keys that this class does not
know are ignored, as in diffusers. `steps_offset` and `clip_sample` are not read:
StableDiffusionPipeline sets them to 1 and False whatever the file says, and so do we.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from sdx.config.leaves import plain, spelled
from sdx.config.resolve import SAMPLER_OF_CLASS
from sdx.config.schema import (
    BetaSchedule,
    DiffusionConfig,
    PredictionType,
    SamplerKind,
    SchedulerClass,
    TimestepSpacing,
)
from sdx.weights.errors import WeightsError
from sdx.weights.export import DIFFUSERS

NUMBERS = ("num_train_timesteps", "beta_start", "beta_end")
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "num_train_timesteps": ((int,), "a whole number"),
    "beta_start": ((int, float), "a number"),
    "beta_end": ((int, float), "a number"),
    "rescale_betas_zero_snr": ((bool,), "true or false"),
}
ENUMS: dict[str, type[Enum]] = {
    "beta_schedule": BetaSchedule,
    "prediction_type": PredictionType,
    "timestep_spacing": TimestepSpacing,
}
# Of every Stable Diffusion release; classes that do not know one of these ignore it.
STABLE_DIFFUSION = {
    "trained_betas": None,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
# Keys we have no switch for, with the values that mean what we compute.
ONLY: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (float("-inf"), "-Infinity", "-inf"),
    "set_alpha_to_one": (False,),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_karras_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small"),
}
# Defaults of diffusers 0.42, for the keys above.
_ALL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "trained_betas": None,
}
_SIGMAS = {
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
ABSENT: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _ALL
    | {"rescale_betas_zero_snr": False, "thresholding": False, "variance_type": "fixed_small"},
    "DDIMScheduler": _ALL
    | {"rescale_betas_zero_snr": False, "thresholding": False, "set_alpha_to_one": True},
    "PNDMScheduler": _ALL | {"set_alpha_to_one": False, "skip_prk_steps": False},
    "EulerDiscreteScheduler": _ALL
    | _SIGMAS
    | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": _ALL
    | _SIGMAS
    | {
        "algorithm_type": "dpmsolver++",
        "lambda_min_clipped": float("-inf"),
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "use_flow_sigmas": False,
        "use_lu_lambdas": False,
        "variance_type": None,
    },
}
CLASS_OF_SAMPLER = {kind: named for named, kind in SAMPLER_OF_CLASS.items()}


def read_scheduler(found: Mapping[str, Any], where: str) -> tuple[DiffusionConfig, SamplerKind]:
    """The noise schedule and the sampler that a scheduler_config.json describes.

    One that names no class is Stable Diffusion's DDIM, whatever keys it lacks. Raises a
    WeightsError, which says `where` the config is from, with every key that asks for something
    else.
    """
    if "_class_name" not in found:
        usual = scheduler_config(DiffusionConfig(), PredictionType.epsilon, SamplerKind.ddim)
        found = usual | dict(found)
    name = found["_class_name"]
    if name not in list(ABSENT):
        raise WeightsError(
            f"{where}: _class_name={name} is not one of {', '.join(ABSENT)}; write one of these, "
            "training does not depend on it."
        )
    known = {key: found.get(key, default) for key, default in ABSENT[name].items()}
    faults = [
        f"{key}={known[key]}: sdx computes only {' or '.join(map(str, allowed))}"
        for key, allowed in ONLY.items()
        if key in known and known[key] not in allowed
    ]
    faults += [
        f"{key}={known[key]}: sdx knows {', '.join(kind.__members__)}"
        for key, kind in ENUMS.items()
        if known[key] not in list(kind.__members__)
    ]
    faults += [
        f"{key}={known[key]!r}: must be {what}"
        for key, (kinds, what) in TYPES.items()
        if key in known and type(known[key]) not in kinds
    ]
    if faults:
        raise WeightsError(f"{where}: {len(faults)} keys ask for another sampler:", faults)
    options: dict[str, Any] = {key: known[key] for key in NUMBERS}
    options |= {key: kind[known[key]] for key, kind in ENUMS.items()}
    rescale = known.get("rescale_betas_zero_snr", False)
    diffusion = DiffusionConfig(**options, rescale_zero_terminal_snr=rescale)
    return diffusion, SAMPLER_OF_CLASS[SchedulerClass[name]]


def schedule_differences(found: Mapping[str, Any], diffusion: DiffusionConfig) -> list[str]:
    """Each key of the noise schedule whose value in a scheduler_config.json is another one.

    Of any class: training does not depend on how a sampler uses the schedule.
    """
    usual = scheduler_config(DiffusionConfig(), PredictionType.epsilon, SamplerKind.ddim)
    known = _ALL if "_class_name" in found else usual
    theirs = {"rescale_betas_zero_snr": False} | known | dict(found)
    keys = {key: key for key in (*NUMBERS, "beta_schedule")}
    keys["rescale_zero_terminal_snr"] = "rescale_betas_zero_snr"
    ours = {key: plain(getattr(diffusion, key)) for key in keys}
    return [
        f"diffusion.{key} is {spelled(ours[key])}, {name} is {spelled(theirs[name])}"
        for key, name in keys.items()
        if ours[key] != theirs[name]
    ]


def scheduler_config(
    diffusion: DiffusionConfig, prediction_type: PredictionType, kind: SamplerKind
) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers draws as `kind` does here.

    `prediction_type` is what the UNet outputs, whatever `diffusion` overrides.
    """
    return {
        "_class_name": CLASS_OF_SAMPLER[kind].name,
        "_diffusers_version": DIFFUSERS,
        **{key: getattr(diffusion, key) for key in NUMBERS},
        "beta_schedule": diffusion.beta_schedule.name,
        "prediction_type": prediction_type.name,
        "timestep_spacing": diffusion.timestep_spacing.name,
        "rescale_betas_zero_snr": diffusion.rescale_zero_terminal_snr,
        **STABLE_DIFFUSION,
    }
