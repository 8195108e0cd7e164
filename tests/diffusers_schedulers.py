"""diffusers' schedulers with Stable Diffusion's settings, driven by any predictor."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from sdx.config.schema import PredictionType, SamplerKind, TimestepSpacing

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
OWN_SETTINGS: dict[SamplerKind, tuple[str, dict[str, Any]]] = {
    SamplerKind.ddpm: ("DDPMScheduler", {"clip_sample": False}),
    SamplerKind.ddim: ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    SamplerKind.pndm: ("PNDMScheduler", {"skip_prk_steps": True}),
    SamplerKind.euler: ("EulerDiscreteScheduler", {}),
    SamplerKind.dpmpp_2m: ("DPMSolverMultistepScheduler", {}),
}


def make_scheduler(
    kind: SamplerKind,
    prediction_type: PredictionType,
    spacing: TimestepSpacing,
    *,
    rescale: bool = False,
    **options: Any,
) -> Any:
    """The scheduler of `kind`; PNDM's has no rescaling to ask for."""
    pytest.importorskip("torch")
    with warnings.catch_warnings(action="ignore"):
        diffusers: Any = pytest.importorskip("diffusers")
    name, settings = OWN_SETTINGS[kind]
    if rescale:
        settings = settings | {"rescale_betas_zero_snr": True}
    return getattr(diffusers, name)(
        prediction_type=prediction_type.name,
        timestep_spacing=spacing.name,
        **(STABLE_DIFFUSION | settings | options),
    )


def drive(
    scheduler: Any,
    num_steps: int,
    noise: Any,
    predict: Callable[[Any, Any], Any],
    draw: Callable[[Any], Any] = lambda timestep: None,
) -> Any:
    """What `scheduler` makes of `noise`, asking `predict` about (latents, timestep).

    DDPM takes its fresh noise from `draw(timestep)`.
    """
    with warnings.catch_warnings(action="ignore"):  # torch's, of NumPy 2
        scheduler.set_timesteps(num_steps)
    x = noise * scheduler.init_noise_sigma
    ddpm = import_module("diffusers.schedulers.scheduling_ddpm")
    for timestep in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(x, timestep), timestep)
        with pytest.MonkeyPatch.context() as patch:
            fresh = draw(timestep)
            patch.setattr(ddpm, "randn_tensor", lambda *shape, fresh=fresh, **options: fresh)
            x = scheduler.step(prediction, timestep, x).prev_sample
    return x
