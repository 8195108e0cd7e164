"""The guided loop around a toy network: diffusers' trajectories, one compilation, one half less
work."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import DiffusionConfig, PredictionType, SamplerKind, TimestepSpacing
from sdx.diffusion.plans import SamplerError
from sdx.diffusion.samplers import fresh_noise
from sdx.diffusion.schedule import make_schedule
from sdx.sampling.denoise import (
    DenoiseRule,
    SamplingStopped,
    denoise,
    initial_latents,
    numbered_noise,
    picture_keys,
)
from tests.diffusers_schedulers import drive, make_scheduler

pytestmark = pytest.mark.fast
SHAPE = (2, 4, 4, 4)
CONTEXT = np.linspace(-1, 1, 2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
SCALE = 7.5
COMBINATIONS = [
    pytest.param(*options, id="-".join(map(str, (*(x.name for x in options[:3]), options[3]))))
    for options in itertools.product(
        SamplerKind, PredictionType, TimestepSpacing, ["plain", "rescaled"]
    )
]


def toy(params: Any, latents: Any, timesteps: Any, context: Any) -> Any:
    """The same arithmetic for JAX and torch; bounded, so that no trajectory runs away."""
    x = params * latents * context[:, :1, :1, None] + (timesteps / 1000)[:, None, None, None]
    return x / (1 + abs(x))


def predict_toy(params: Any, latents: Any, timesteps: Any, context: Any) -> Any:
    return toy(params, latents, timesteps.astype(jnp.float32), context)


def make_rule(**changes: Any) -> DenoiseRule:
    options: dict[str, Any] = {
        "predict": predict_toy,
        "schedule": make_schedule(DiffusionConfig()),
        "prediction_type": PredictionType.v_prediction,
        "spacing": TimestepSpacing.leading,
        "kind": SamplerKind.ddim,
    }
    return DenoiseRule(**(options | changes))


def run(
    rule: DenoiseRule,
    *,
    num_steps: int = 4,
    scale: float = SCALE,
    rows: int = 2,
    place: Any = None,
    **options: Any,
) -> np.ndarray:
    inputs = initial_latents(0, SHAPE), picture_keys(0, len(CONTEXT)), CONTEXT, -CONTEXT
    placed = (jax.device_put(x[:rows], place) for x in inputs)
    options = {"num_steps": num_steps, "guidance_scale": scale} | options
    return np.asarray(denoise(rule, jnp.float32(0.5), *placed, **options))


def run_diffusers(scheduler: Any, num_steps: int, *, rescale: float = 0.0) -> np.ndarray:
    """The same drawing with torch, guided as StableDiffusionPipeline does; DDPM is given the noise
    that we draw."""
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    def predict(x: Any, timestep: Any) -> Any:
        times = timestep.repeat(2).float()
        negative, positive = (toy(0.5, x, times, torch.tensor(c)) for c in (-CONTEXT, CONTEXT))
        pushed = negative + SCALE * (positive - negative)
        return rescale_noise_cfg(pushed, positive, rescale) if rescale else pushed

    def draw(timestep: Any) -> Any:
        keys = jnp.asarray(picture_keys(0, 2))
        return torch.tensor(np.array(fresh_noise(keys, jnp.int32(int(timestep)), SHAPE)))

    noise = torch.tensor(initial_latents(0, SHAPE))
    return drive(scheduler, num_steps, noise, predict, draw).numpy()


@pytest.mark.parametrize(("kind", "prediction_type", "spacing", "betas"), COMBINATIONS)
def test_guided_trajectory_is_diffusers(
    kind: SamplerKind, prediction_type: PredictionType, spacing: TimestepSpacing, betas: str
) -> None:
    """Ten steps of every combination that is not refused; what is, diffusers cannot do either."""
    rescale = betas == "rescaled"
    try:
        scheduler = make_scheduler(kind, prediction_type, spacing, rescale=rescale)
        theirs = run_diffusers(scheduler, 10)
    except (TypeError, ValueError):  # PNDM's has no rescaling and no sample prediction
        theirs = np.full(SHAPE, np.nan)
    schedule = make_schedule(DiffusionConfig(rescale_zero_terminal_snr=rescale))
    rule = make_rule(kind=kind, prediction_type=prediction_type, spacing=spacing, schedule=schedule)
    if not np.isfinite(theirs).all():
        with pytest.raises(SamplerError, match=f"^sampler={kind.name}: .*use "):
            run(rule, num_steps=10)
        return
    ours, scale = run(rule, num_steps=10), max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescaled_guidance_is_diffusers(rescale: float) -> None:
    """Where it is for: v-prediction, from noise without any signal."""
    v, trailing = PredictionType.v_prediction, TimestepSpacing.trailing
    scheduler = make_scheduler(SamplerKind.ddim, v, trailing, rescale=True)
    theirs = run_diffusers(scheduler, 10, rescale=rescale)
    schedule = make_schedule(DiffusionConfig(rescale_zero_terminal_snr=True))
    rule = make_rule(spacing=trailing, schedule=schedule)
    ours = run(rule, num_steps=10, guidance_rescale=rescale)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert np.abs(run(rule, num_steps=10) - theirs).max() > 1e-2


def counting(traced: list[int], **changes: Any) -> DenoiseRule:
    """A rule whose network notes the rows it is traced with, once for each compilation."""

    def predict(params: Any, latents: jax.Array, *rest: Any) -> jax.Array:
        traced.append(latents.shape[0])
        return params * latents

    return make_rule(predict=predict, **changes)


@pytest.mark.parametrize("kind", SamplerKind)
def test_neither_steps_scale_nor_spacing_compile_again(kind: SamplerKind) -> None:
    traced: list[int] = []
    rule = counting(traced, kind=kind)
    run(rule)
    run(replace(rule, spacing=TimestepSpacing.linspace), num_steps=7, scale=3.0)
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


def test_ddpm_draws_for_a_picture_whatever_follows() -> None:
    rule = make_rule(kind=SamplerKind.ddpm)
    both = run(rule)
    np.testing.assert_allclose(run(rule, rows=1), both[:1], atol=1e-5)
    np.testing.assert_array_equal(run(rule), both)
    keys = jnp.asarray(picture_keys(0, 2))
    draws = [np.asarray(fresh_noise(keys, jnp.int32(t), SHAPE)) for t in (901, 801)]
    distinct = [draws[0][0], draws[0][1], draws[1][0], initial_latents(0, SHAPE)[0]]
    assert all(np.abs(a - b).max() > 1 for a, b in itertools.combinations(distinct, 2))


@pytest.mark.parametrize("kind", [SamplerKind.ddpm, SamplerKind.pndm])
def test_pictures_split_over_devices_are_the_same(kind: SamplerKind) -> None:
    """So are what a sampler remembers and the keys it draws with."""
    devices = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    split = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data"))
    whole, parted = (run(make_rule(kind=kind), place=place) for place in (None, split))
    np.testing.assert_allclose(parted, whole, atol=1e-5)


def test_a_picture_of_a_large_set_begins_from_its_number_alone() -> None:
    latents, keys = numbered_noise(3, [0, 1, 2, 30_000], (4, 4, 2))
    some, some_keys = numbered_noise(3, [30_000, 1], (4, 4, 2))
    np.testing.assert_array_equal(some, latents[[3, 1]])
    np.testing.assert_array_equal(some_keys, keys[[3, 1]])
    other, _ = numbered_noise(4, [0], (4, 4, 2))
    assert len(np.unique(np.concatenate([latents, other]))) == 5 * 32
