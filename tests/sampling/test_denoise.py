"""The guided loop around a toy network: diffusers' trajectory, one compilation, one half less
work."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import DiffusionConfig, PredictionType, TimestepSpacing
from sdx.diffusion.schedule import make_schedule
from sdx.sampling.denoise import DenoiseRule, SamplingStopped, denoise, initial_latents

pytestmark = pytest.mark.fast
SHAPE = (2, 4, 4, 4)
CONTEXT = np.linspace(-1, 1, 2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)


def toy(params: Any, latents: Any, timesteps: Any, context: Any) -> Any:
    """The same arithmetic for JAX and torch."""
    return params * latents * context[:, :1, :1, None] + (timesteps / 1000)[:, None, None, None]


def make_rule(**changes: Any) -> DenoiseRule:
    options: dict[str, Any] = {
        "predict": lambda params, x, timesteps, context: toy(
            params, x, timesteps.astype(jnp.float32), context
        ),
        "schedule": make_schedule(DiffusionConfig()),
        "prediction_type": PredictionType.v_prediction,
        "spacing": TimestepSpacing.leading,
    }
    return DenoiseRule(**(options | changes))


def run(rule: DenoiseRule, *, num_steps: int = 4, scale: float = 7.5, **options: Any) -> np.ndarray:
    latents = jnp.asarray(initial_latents(0, SHAPE))
    contexts = jnp.asarray(CONTEXT), jnp.asarray(-CONTEXT)
    params = jnp.float32(0.5)
    return np.asarray(
        denoise(
            rule, params, latents, *contexts, num_steps=num_steps, guidance_scale=scale, **options
        )
    )


@pytest.mark.parametrize("spacing", TimestepSpacing)
def test_guided_trajectory_is_diffusers(spacing: TimestepSpacing) -> None:
    diffusers: Any = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        timestep_spacing=spacing.name,
    )  # fmt: skip
    theirs.set_timesteps(4)
    x, context = torch.tensor(initial_latents(0, SHAPE)), torch.tensor(CONTEXT)
    for timestep in theirs.timesteps:
        times = timestep.repeat(2).float()
        negative, positive = (toy(0.5, x, times, c) for c in (-context, context))
        x = theirs.step(negative + 7.5 * (positive - negative), timestep, x).prev_sample
    ours = run(make_rule(spacing=spacing))
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-5 * float(x.abs().max()))


def counting(traced: list[int]) -> DenoiseRule:
    """A rule whose network notes the rows it is traced with, once for each compilation."""

    def predict(params: Any, latents: jax.Array, *rest: Any) -> jax.Array:
        traced.append(latents.shape[0])
        return params * latents

    return make_rule(predict=predict)


def test_neither_steps_nor_scale_compile_again() -> None:
    traced: list[int] = []
    rule = counting(traced)
    run(rule)
    run(rule, num_steps=7, scale=3.0, guidance_rescale=0.7)
    assert len(traced) == 1


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (7.5, 4)])
def test_without_guidance_half_is_computed(scale: float, rows: int) -> None:
    traced: list[int] = []
    run(counting(traced), scale=scale)
    assert traced == [rows]


def test_it_stops_between_two_updates() -> None:
    answers: Iterator[bool] = iter([False, False, True])
    with pytest.raises(SamplingStopped):
        run(make_rule(), should_stop=lambda: next(answers))
    assert next(answers, None) is None


def test_a_place_has_its_noise_whatever_follows() -> None:
    few, many = initial_latents(5, (2, 4, 4, 4)), initial_latents(5, (6, 4, 4, 4))
    np.testing.assert_array_equal(few, many[:2])
    assert not np.array_equal(few, initial_latents(6, (2, 4, 4, 4)))
    assert not np.array_equal(many[0], many[1])
