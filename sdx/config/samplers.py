"""Which samplers can draw what, as far as the configuration alone decides it.

What is refused is what diffusers' schedulers cannot do: an option they lack, or a division by zero.
"""

from sdx.config.schema import PredictionType, SamplerKind, TimestepSpacing

# diffusers has these two start at 2**-24 instead of 0, where a schedule leaves no signal at all.
_NEVER_ZERO = {SamplerKind.euler, SamplerKind.dpmpp_2m}


def refusal(
    kind: SamplerKind,
    prediction_type: PredictionType,
    spacing: TimestepSpacing,
    *,
    rescale: bool,
) -> str | None:
    """Why `kind` cannot draw from such a model, and what can; None where it can.

    `rescale` is `diffusion.rescale_zero_terminal_snr`.
    """
    if kind is SamplerKind.pndm and prediction_type is PredictionType.sample:
        return "is not defined for prediction_type=sample; use ddim, ddpm, euler or dpmpp_2m"
    if kind is SamplerKind.pndm and rescale:
        return (
            "is not defined for diffusion.rescale_zero_terminal_snr=true; use ddim, ddpm, euler or"
            " dpmpp_2m"
        )
    starts_dark = rescale and spacing is not TimestepSpacing.leading and kind not in _NEVER_ZERO
    if starts_dark and prediction_type is PredictionType.epsilon:
        return (
            "divides by zero at the last timestep, where diffusion.rescale_zero_terminal_snr=true"
            " leaves only noise; use diffusion.prediction_type=v_prediction, sampler=euler,"
            " sampler=dpmpp_2m or diffusion.timestep_spacing=leading"
        )
    return None


def divides_by_zero(
    kind: SamplerKind,
    prediction_type: PredictionType,
    spacing: TimestepSpacing,
    *,
    rescale: bool,
    num_timesteps: int,
    num_steps: int,
) -> bool:
    """Whether so many steps of a sampler that `refusal` allows begin where no signal is left.

    Leading does, for instance with 500 or 999 steps of 1000 timesteps.
    """
    if not rescale or kind in _NEVER_ZERO or spacing is not TimestepSpacing.leading:
        return False
    first = (num_steps - 1) * (num_timesteps // num_steps) + 1
    return prediction_type is PredictionType.epsilon and first == num_timesteps - 1


def most_steps(kind: SamplerKind, spacing: TimestepSpacing, num_timesteps: int) -> int:
    """The most steps a sampler can take through a schedule of `num_timesteps`.

    Leading loses one to steps_offset; DPM-Solver++ counts one more than it takes.
    """
    lost = spacing is TimestepSpacing.leading
    lost += kind is SamplerKind.dpmpp_2m and spacing is not TimestepSpacing.trailing
    return num_timesteps - lost
