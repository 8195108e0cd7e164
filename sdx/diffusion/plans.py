"""Sampler plans: the timesteps a sampler visits, and the noise levels its updates go between.

Made on the host in float64, from the schedule alone; `samplers.py` has the updates that read them.
Timesteps, levels and where they end are those of diffusers' DDIMScheduler, DDPMScheduler,
PNDMScheduler, EulerDiscreteScheduler and DPMSolverMultistepScheduler with the settings of Stable
Diffusion: steps_offset 1, set_alpha_to_one false, final_sigmas_type zero, skip_prk_steps true.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, assert_never

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from sdx.config.samplers import most_steps, refusal
from sdx.config.schema import PredictionType, SamplerKind, TimestepSpacing
from sdx.diffusion.schedule import NoiseSchedule

STEPS_OFFSET = 1  # in the scheduler config of every Stable Diffusion release
DARKEST = 2.0**-24  # stands for an a_t of 0 where noise / signal must be finite, as in diffusers
# PNDM: weights of the newest prediction and the three before it, when 1, 2, 3 or 4 are known.
ADAMS_BASHFORTH = np.array(
    [
        [1, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)
AVERAGE = (1 / 2, 1 / 2, 0, 0)  # of the predictions at both ends, when the first step is retried

Table = Float[np.ndarray, " steps"]
Levels = tuple[Table, Table]
"""The shares of clean latents and of noise at each level: s and q in x = s * x0 + q * n."""


class SamplerError(ValueError):
    """A sampler cannot draw from this model, or not in that many steps."""


class Step(NamedTuple):
    """What one update reads; a plan holds NumPy arrays, with a leading dimension of updates."""

    timestep: Real[Array, "*steps"]
    signal: Float[Array, "*steps"]
    """s and, next, q of the level where the update starts."""
    sigma: Float[Array, "*steps"]
    end_signal: Float[Array, "*steps"]
    end_sigma: Float[Array, "*steps"]
    weights: Float[Array, "*steps k"]
    """Of what an estimate is mixed from; the kind says of what."""
    is_retry: Bool[Array, "*steps"]
    """Starts where the first update started: PNDM's second."""


@dataclass(frozen=True)
class SamplerPlan:
    """The updates of one drawing, from noisy to clean; a loop over it gives each one's `Step`."""

    steps: Step
    start_scale: float = 1.0
    """What the noise that a drawing starts from is multiplied by."""

    def __iter__(self) -> Iterator[Step]:
        return (Step(*fields) for fields in zip(*self.steps, strict=True))


def make_plan(
    kind: SamplerKind,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    spacing: TimestepSpacing,
    num_steps: int,
) -> SamplerPlan:
    """The updates that make a picture in `num_steps` steps; PNDM needs one more.

    Raises SamplerError for what diffusers cannot do either.
    """
    length = schedule.num_timesteps
    rescale = schedule.alphas_cumprod[-1] == 0
    if reason := refusal(kind, prediction_type, spacing, rescale=bool(rescale)):
        raise SamplerError(f"sampler={kind.name}: {reason}.")
    most = most_steps(kind, spacing, length)
    if not 1 <= num_steps <= most:
        raise SamplerError(
            f"sample.num_steps={num_steps}: must lie between 1 and {most} with sampler={kind.name},"
            f" diffusion.num_train_timesteps={length} and"
            f" diffusion.timestep_spacing={spacing.name}."
        )
    plan = _PLANS[kind](schedule, spacing, num_steps)
    if prediction_type is PredictionType.epsilon and not plan.steps.signal.all():
        raise SamplerError(
            f"sample.num_steps={num_steps}: reaches the last timestep, where"
            f" sampler={kind.name} would divide by zero signal; use fewer."
        )
    return plan


def _ddim(schedule: NoiseSchedule, spacing: TimestepSpacing, num_steps: int) -> SamplerPlan:
    visited = _visited(spacing, schedule.num_timesteps, num_steps)
    ends = _one_stride_on(visited, schedule.num_timesteps)
    return _plan(visited, _levels(schedule, visited), _levels(schedule, ends))


def _ddpm(schedule: NoiseSchedule, spacing: TimestepSpacing, num_steps: int) -> SamplerPlan:
    """Weights: of the predicted noise and of fresh noise, for DDPM's variance.

    It ends at the next timestep visited, behind the last one at no noise at all.
    """
    visited = _visited(spacing, schedule.num_timesteps, num_steps)
    signal, sigma = _levels(schedule, visited)
    end_signal, end_sigma = np.append(signal[1:], 1), np.append(sigma[1:], 0)
    kept = (signal * end_sigma) / (sigma * end_signal)
    weights = np.stack([kept, np.sqrt(1 - kept**2)], axis=-1)
    return _plan(visited, (signal, sigma), (end_signal, end_sigma), weights=weights)


def _pndm(schedule: NoiseSchedule, spacing: TimestepSpacing, num_steps: int) -> SamplerPlan:
    """Weights: of the newest prediction and the three before it.

    The second timestep is visited twice, the first time to take the first step once more.
    """
    length = schedule.num_timesteps
    spaced = _visited(spacing, length, num_steps)
    visited = np.concatenate([spaced[:2], spaced[1:]])
    starts, ends = visited.copy(), _one_stride_on(spaced, length)
    ends = np.concatenate([ends[:1], spaced[1:2], ends[1:]])
    starts[1:2] += length // num_steps
    is_retry = np.arange(len(visited)) == 1
    known = np.clip(np.arange(len(visited)) - 1, 0, 3)
    weights = np.where(is_retry[:, None], AVERAGE, ADAMS_BASHFORTH[known])
    levels = _levels(schedule, starts), _levels(schedule, ends)
    return _plan(visited, *levels, weights=weights, is_retry=is_retry)


def _euler(schedule: NoiseSchedule, spacing: TimestepSpacing, num_steps: int) -> SamplerPlan:
    """Linspace visits fractions of timesteps, at noise / signal interpolated between them."""
    visited = _visited(spacing, schedule.num_timesteps, num_steps, whole=False)
    ratios = _noise_to_signal(schedule)
    ratios = np.append(np.interp(visited, np.arange(len(ratios)), ratios), 0)
    signal, sigma = _levels_of_ratios(ratios)
    plan = _plan(visited, (signal[:-1], sigma[:-1]), (signal[1:], sigma[1:]))
    start_scale = 1.0 if spacing is TimestepSpacing.leading else float(sigma[0])
    return replace(plan, start_scale=start_scale)


def _dpmpp_2m(schedule: NoiseSchedule, spacing: TimestepSpacing, num_steps: int) -> SamplerPlan:
    """Weights: of this estimate of the clean latents and of the one before.

    The first and the last update are of first order.
    """
    visited = _visited(spacing, schedule.num_timesteps, num_steps, uncounted=1)
    ratios = np.append(_noise_to_signal(schedule)[visited], 0)
    strides = np.diff(-np.log(ratios[:-1]))
    extrapolation = np.zeros(num_steps)
    extrapolation[1:-1] = strides[1:] / (2 * strides[:-1])
    signal, sigma = _levels_of_ratios(ratios)
    weights = np.stack([1 + extrapolation, -extrapolation], axis=-1)
    return _plan(visited, (signal[:-1], sigma[:-1]), (signal[1:], sigma[1:]), weights=weights)


_PLANS: dict[SamplerKind, Callable[[NoiseSchedule, TimestepSpacing, int], SamplerPlan]] = {
    SamplerKind.ddpm: _ddpm,
    SamplerKind.ddim: _ddim,
    SamplerKind.pndm: _pndm,
    SamplerKind.euler: _euler,
    SamplerKind.dpmpp_2m: _dpmpp_2m,
}


def _plan(
    visited: Real[np.ndarray, " steps"],
    starts: Levels,
    ends: Levels,
    *,
    weights: Float[np.ndarray, "steps k"] | None = None,
    is_retry: Bool[np.ndarray, " steps"] | None = None,
) -> SamplerPlan:
    """The tables rounded to what updates compute in: int32 or float32 timesteps, float32 levels."""
    num_updates = len(visited)
    weights = np.zeros((num_updates, 0)) if weights is None else weights
    is_retry = np.zeros(num_updates, bool) if is_retry is None else is_retry
    whole = np.issubdtype(visited.dtype, np.integer)
    visited = visited.astype(np.int32 if whole else np.float32)
    tables: list[Any] = [table.astype(np.float32) for table in (*starts, *ends, weights)]
    return SamplerPlan(Step(*[visited, *tables, is_retry]))


def _visited(
    spacing: TimestepSpacing,
    length: int,
    num_steps: int,
    *,
    whole: bool = True,
    uncounted: int = 0,
) -> Real[np.ndarray, " steps"]:
    """Timesteps from noisy to clean (Lin et al. 2023, arXiv 2305.08891, table 2).

    `uncounted` steps are left out at the clean end, except of trailing.
    """
    count = num_steps + uncounted
    match spacing:
        case TimestepSpacing.leading:
            visited = np.arange(count)[::-1] * (length // count) + STEPS_OFFSET
        case TimestepSpacing.trailing:
            # arange's own rounding decides some ties; where it counts one too many, diffusers
            # visits timestep -1.
            visited = np.round(np.arange(length, 0, -length / num_steps)) - 1
        case TimestepSpacing.linspace:
            visited = np.linspace(0, length - 1, count)[::-1]
        case _:
            assert_never(spacing)
    visited = visited[:num_steps].astype(np.float64)
    return np.round(visited).astype(np.int64) if whole else visited


def _one_stride_on(visited: Int[np.ndarray, " steps"], length: int) -> Int[np.ndarray, " steps"]:
    """The timestep an update ends at, where that is not the next visited one; 0 behind the last."""
    return np.maximum(visited - length // len(visited), 0)


def _levels(schedule: NoiseSchedule, timesteps: Int[np.ndarray, " steps"]) -> Levels:
    """s and q at `timesteps`, with 1 - a_t rounded as in training."""
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    return (
        np.sqrt(alphas_cumprod.astype(np.float64)),
        np.sqrt((1 - alphas_cumprod).astype(np.float64)),
    )


def _noise_to_signal(schedule: NoiseSchedule) -> Float[np.ndarray, " t"]:
    """q / s of every timestep (`sigmas` in diffusers), finite where no signal is left."""
    alphas_cumprod = schedule.alphas_cumprod.astype(np.float64)
    alphas_cumprod = np.where(alphas_cumprod == 0, DARKEST, alphas_cumprod)
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def _levels_of_ratios(ratios: Table) -> Levels:
    signal = 1 / np.sqrt(ratios**2 + 1)
    return signal, ratios * signal
