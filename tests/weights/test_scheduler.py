"""Scheduler configs: diffusers reads in them what we mean, and we read what diffusers does."""

import inspect
import itertools
import warnings
from importlib import import_module
from typing import Any

import pytest

from sdx.config.samplers import refusal
from sdx.config.schema import (
    BetaSchedule,
    DiffusionConfig,
    PredictionType,
    SamplerKind,
    TimestepSpacing,
)
from sdx.weights.errors import WeightsError
from sdx.weights.scheduler import ABSENT, CLASS_OF_SAMPLER, read_scheduler, scheduler_config
from tests.diffusers_schedulers import make_scheduler

pytestmark = pytest.mark.fast
COMBINATIONS = [
    options
    for options in itertools.product(SamplerKind, PredictionType, TimestepSpacing, [False, True])
    if refusal(*options[:3], rescale=options[3]) is None
]
USUAL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# As they lie on the Hub, without their _diffusers_version.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "stable-diffusion-v1-5": (
        USUAL | {
            "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "set_alpha_to_one": False,
            "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
        },
        (SamplerKind.pndm, PredictionType.epsilon, TimestepSpacing.leading),
    ),
    "stable-diffusion-2-1": (
        USUAL | {
            "_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": 1000,
            "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True,
            "steps_offset": 1, "trained_betas": None,
        },
        (SamplerKind.ddim, PredictionType.v_prediction, TimestepSpacing.leading),
    ),
    "sd-turbo": (
        USUAL | {
            "_class_name": "EulerDiscreteScheduler", "clip_sample": False,
            "interpolation_type": "linear", "num_train_timesteps": 1000,
            "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
            "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing",
            "trained_betas": None, "use_karras_sigmas": False,
        },
        (SamplerKind.euler, PredictionType.epsilon, TimestepSpacing.trailing),
    ),
}  # fmt: skip
# Keys that would draw other pictures: each must be refused.
REFUSED = [
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDPMScheduler", {"thresholding": True}),
    ("DDIMScheduler", {"set_alpha_to_one": True}),
    ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
    ("DPMSolverMultistepScheduler", {"num_train_timesteps": "1000"}),
]


def described(kind: SamplerKind, **changes: Any) -> dict[str, Any]:
    return scheduler_config(DiffusionConfig(), PredictionType.epsilon, kind) | changes


@pytest.mark.parametrize(("kind", "prediction_type", "spacing", "rescale"), COMBINATIONS)
def test_diffusers_reads_the_scheduler_we_equal(
    kind: SamplerKind, prediction_type: PredictionType, spacing: TimestepSpacing, rescale: bool
) -> None:
    """The one whose trajectories test_denoise compares; and we read back what was written."""
    wanted = make_scheduler(kind, prediction_type, spacing, rescale=rescale)
    diffusion = DiffusionConfig(timestep_spacing=spacing, rescale_zero_terminal_snr=rescale)
    written = scheduler_config(diffusion, prediction_type, kind)
    read = type(wanted).from_config(written)
    assert type(wanted).__name__ == written["_class_name"]
    public = [key for key in wanted.config if not key.startswith("_")]
    assert {key: read.config[key] for key in public} == {key: wanted.config[key] for key in public}
    diffusion.prediction_type = prediction_type
    assert read_scheduler(written, "") == (diffusion, kind)


def test_every_override_is_written() -> None:
    diffusion = DiffusionConfig(
        num_train_timesteps=500, beta_schedule=BetaSchedule.linear, beta_start=0.001, beta_end=0.1
    )
    written = scheduler_config(diffusion, PredictionType.sample, SamplerKind.euler)
    back, kind = read_scheduler(written, "")
    diffusion.prediction_type = PredictionType.sample
    assert (back, kind) == (diffusion, SamplerKind.euler)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    found, (kind, prediction_type, spacing) = PUBLISHED[name]
    expected = DiffusionConfig(prediction_type=prediction_type, timestep_spacing=spacing)
    assert read_scheduler(found, "") == (expected, kind)


@pytest.mark.parametrize("name", ABSENT)
def test_what_a_file_leaves_out_is_the_default_of_its_class(name: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        diffusers: Any = pytest.importorskip("diffusers")
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert ABSENT[name] == {key: parameters[key].default for key in ABSENT[name]}


def test_no_class_is_stable_diffusions_ddim() -> None:
    expected = DiffusionConfig(prediction_type=PredictionType.v_prediction)
    found = read_scheduler({"prediction_type": "v_prediction"}, "")
    assert found == (expected, SamplerKind.ddim)


def test_keys_of_other_classes_are_ignored_like_the_two_the_pipeline_overrules() -> None:
    """StableDiffusionPipeline sets steps_offset to 1 and clip_sample to False."""
    changes = {"solver_order": 3, "skip_prk_steps": False, "steps_offset": 0, "clip_sample": True}
    found = described(SamplerKind.ddim, **changes)
    assert read_scheduler(found, "") == read_scheduler(described(SamplerKind.ddim), "")
    source = inspect.getsource(
        import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    )
    assert 'new_config["steps_offset"] = 1' in source
    assert 'new_config["clip_sample"] = False' in source


@pytest.mark.parametrize(("name", "change"), REFUSED)
def test_other_mathematics_is_refused(name: str, change: dict[str, Any]) -> None:
    kind = next(kind for kind, named in CLASS_OF_SAMPLER.items() if named.name == name)
    with pytest.raises(WeightsError, match="^file: 1 keys ask for another sampler:\n  ") as error:
        read_scheduler(described(kind, **change), "file")
    ((key, got),) = change.items()
    assert f"{key}={got!r}: " in str(error.value) or f"{key}={got}: " in str(error.value)


def test_all_faults_come_at_once_and_an_unknown_class_alone() -> None:
    broken = described(SamplerKind.ddim, set_alpha_to_one=True, beta_schedule="sigmoid")
    with pytest.raises(WeightsError, match="file: 2 keys"):
        read_scheduler(broken, "file")
    with pytest.raises(WeightsError, match="file: _class_name=UniPCMultistepScheduler is not one"):
        read_scheduler({"_class_name": "UniPCMultistepScheduler"}, "file")
