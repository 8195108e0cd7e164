"""Plans: diffusers' timesteps and noise levels, and what no sampler can do."""

import itertools
from typing import Any

import numpy as np
import pytest

from sdx.config.samplers import divides_by_zero, most_steps, refusal
from sdx.config.schema import DiffusionConfig, PredictionType, SamplerKind, TimestepSpacing
from sdx.diffusion.plans import SamplerError, SamplerPlan, make_plan
from sdx.diffusion.schedule import NoiseSchedule, make_schedule
from tests.diffusers_schedulers import make_scheduler

pytestmark = pytest.mark.fast
SCHEDULE = make_schedule(DiffusionConfig())
DARK = make_schedule(DiffusionConfig(rescale_zero_terminal_snr=True))
SIGMAS = (SamplerKind.euler, SamplerKind.dpmpp_2m)


def plan(
    kind: SamplerKind,
    spacing: TimestepSpacing,
    num_steps: int,
    *,
    schedule: NoiseSchedule = SCHEDULE,
    prediction_type: PredictionType = PredictionType.v_prediction,
) -> SamplerPlan:
    return make_plan(kind, schedule, prediction_type, spacing, num_steps)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of NumPy 2
@pytest.mark.parametrize("spacing", TimestepSpacing)
@pytest.mark.parametrize("kind", SamplerKind)
def test_timesteps_are_diffusers(kind: SamplerKind, spacing: TimestepSpacing) -> None:
    """Without the -1 that theirs visit at the end of trailing, at 61 and 998 steps for instance."""
    scheduler = make_scheduler(kind, PredictionType.epsilon, spacing)
    for num_steps in (1, 2, 3, 7, 10, 30, 48, 50, 61, 501, 998):
        scheduler.set_timesteps(num_steps)
        theirs = scheduler.timesteps.numpy()
        visited = plan(kind, spacing, num_steps).steps.timestep
        np.testing.assert_array_equal(visited, theirs[theirs >= 0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("spacing", TimestepSpacing)
@pytest.mark.parametrize("kind", SIGMAS)
def test_levels_are_diffusers_sigmas(
    kind: SamplerKind, spacing: TimestepSpacing, rescale: bool
) -> None:
    """Down to none at all; only Euler's start is louder than the noise it is given."""
    scheduler = make_scheduler(kind, PredictionType.epsilon, spacing, rescale=rescale)
    scheduler.set_timesteps(10)
    ours = plan(kind, spacing, 10, schedule=DARK if rescale else SCHEDULE)
    steps = ours.steps
    sigmas = scheduler.sigmas.numpy()
    np.testing.assert_allclose(steps.sigma / steps.signal, sigmas[:-1], rtol=1e-6)
    np.testing.assert_allclose(steps.end_sigma / steps.end_signal, sigmas[1:], rtol=1e-6)
    start = float(scheduler.init_noise_sigma) / (
        np.hypot(1, sigmas[0]) if kind is SamplerKind.euler else 1
    )
    assert ours.start_scale == pytest.approx(start, rel=1e-6)


@pytest.mark.parametrize(("kind", "spacing"), list(itertools.product(SamplerKind, TimestepSpacing)))
def test_every_number_of_steps_goes_down_within_the_schedule(
    kind: SamplerKind, spacing: TimestepSpacing
) -> None:
    """To the most that are allowed; one more is refused, by a message that says how many are."""
    short = make_schedule(DiffusionConfig(num_train_timesteps=30))
    most = most_steps(kind, spacing, 30)
    for num_steps in range(1, most + 1):
        visited = plan(kind, spacing, num_steps, schedule=short).steps.timestep
        if kind is SamplerKind.pndm:  # it comes back to the second one
            visited = np.delete(visited, slice(1, 2) if num_steps > 1 else slice(0, 0))
        assert len(visited) == num_steps
        assert visited[0] <= 29 and visited[-1] >= 0
        assert (np.diff(visited) < 0).all()
    for num_steps in (0, most + 1):
        with pytest.raises(SamplerError) as error:
            plan(kind, spacing, num_steps, schedule=short)
        assert str(error.value) == (
            f"sample.num_steps={num_steps}: must lie between 1 and {most} with"
            f" sampler={kind.name}, diffusion.num_train_timesteps=30 and"
            f" diffusion.timestep_spacing={spacing.name}."
        )


def test_updates_meet_where_the_next_one_starts() -> None:
    """Except for DDIM and PNDM off leading, which stride by a whole number of timesteps."""
    for kind in (SamplerKind.ddpm, *SIGMAS, SamplerKind.ddim):
        steps = plan(kind, TimestepSpacing.leading, 10).steps
        np.testing.assert_array_equal(steps.end_sigma[:-1], steps.sigma[1:])
        np.testing.assert_array_equal(steps.end_signal[:-1], steps.signal[1:])


def test_the_last_update_ends_where_stable_diffusion_ends() -> None:
    """set_alpha_to_one false: at the noise of timestep 0 for DDIM and PNDM, without any else."""
    first = np.sqrt(1 - SCHEDULE.alphas_cumprod[0])
    for kind in SamplerKind:
        expected = first if kind in (SamplerKind.ddim, SamplerKind.pndm) else 0
        end = plan(kind, TimestepSpacing.leading, 10).steps.end_sigma[-1]
        assert end == pytest.approx(expected, rel=1e-6)


def test_epsilon_is_not_divided_by_a_signal_of_zero() -> None:
    """Leading spacing avoids the last timestep, until steps are so many that it does not."""
    options: dict[str, Any] = {"schedule": DARK, "prediction_type": PredictionType.epsilon}
    leading, ddim = TimestepSpacing.leading, SamplerKind.ddim
    assert plan(ddim, leading, 400, **options).steps.signal.min() > 0
    with pytest.raises(SamplerError, match="sample.num_steps=999: reaches the last timestep"):
        plan(ddim, leading, 999, **options)
    assert plan(SamplerKind.euler, leading, 999, **options).steps.signal[0] == 2.0**-12
    with pytest.raises(SamplerError, match="sampler=ddpm: divides by zero at the last timestep"):
        plan(SamplerKind.ddpm, TimestepSpacing.linspace, 10, **options)


@pytest.mark.parametrize(("kind", "spacing"), list(itertools.product(SamplerKind, TimestepSpacing)))
def test_the_configuration_tells_which_steps_divide_by_zero(
    kind: SamplerKind, spacing: TimestepSpacing
) -> None:
    """Before a run, exactly those are refused that could not be drawn after it."""
    epsilon = PredictionType.epsilon
    for length in (2, 7, 20, 21):
        dark = make_schedule(
            DiffusionConfig(num_train_timesteps=length, rescale_zero_terminal_snr=True)
        )
        if refusal(kind, epsilon, spacing, rescale=True) is not None:
            continue
        for num_steps in range(1, most_steps(kind, spacing, length) + 1):
            told = divides_by_zero(
                kind, epsilon, spacing, rescale=True, num_timesteps=length, num_steps=num_steps
            )
            try:
                plan(kind, spacing, num_steps, schedule=dark, prediction_type=epsilon)
                met = False
            except SamplerError as error:
                met = "reaches the last timestep" in str(error)
            assert told == met, (length, num_steps)
