"""Derived values: batch, length, schedule and types."""

import dataclasses

import pytest

from sdx.config import resolve
from sdx.config.schema import Config, PredictionType, SamplerKind, SchedulerClass
from tests.config.quick import quick

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def base() -> Config:
    return quick(["model=sd21", "hardware=gpu_h100_8"])


def changed(config: Config, **groups: dict) -> Config:
    parts = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in groups.items()
    }
    return dataclasses.replace(config, **parts)


def test_resolution_and_prediction_type_are_the_models_unless_given(base: Config) -> None:
    assert resolve.resolution(base) == 768
    assert resolve.prediction_type(base) is PredictionType.v_prediction
    other = changed(
        base, data={"resolution": 512}, diffusion={"prediction_type": PredictionType.epsilon}
    )
    assert resolve.resolution(other) == 512
    assert resolve.prediction_type(other) is PredictionType.epsilon


def test_the_sampler_is_that_of_the_scheduler_class_where_one_is_named(base: Config) -> None:
    assert resolve.sampler_kind(base) is SamplerKind.ddim
    for named in SchedulerClass:
        kind = resolve.sampler_kind(changed(base, diffusion={"class_name": named}))
        assert named.name.removesuffix("Scheduler").lower() in {
            *(
                kind.name,
                {"euler": "eulerdiscrete", "dpmpp_2m": "dpmsolvermultistep"}.get(kind.name),
            )
        }


def test_factors_of_stable_diffusion(base: Config) -> None:
    assert (resolve.vae_factor(base), resolve.unet_factor(base)) == (8, 8)


def test_activations_are_bfloat16_on_accelerators(base: Config) -> None:
    assert resolve.activations_dtype(base) == "bfloat16"
    assert resolve.activations_dtype(quick([])) == "float32"
    assert resolve.activations_dtype(quick(["model.activations_dtype=bfloat16"])) == "bfloat16"


@pytest.mark.parametrize(
    ("per_device", "accumulation", "expected"), [(4, 1, 32), (0.5, 1, 4), (4, 3, 96), (0.125, 2, 2)]
)
def test_global_batch(base: Config, per_device: float, accumulation: int, expected: int) -> None:
    train = {"per_device_batch_size": per_device, "gradient_accumulation": accumulation}
    assert resolve.global_batch_size(changed(base, train=train)) == expected


def test_a_given_global_batch_wins(base: Config) -> None:
    assert resolve.global_batch_size(changed(base, train={"global_batch_size": 24})) == 24


def test_devices_found_count_where_the_preset_is_silent(base: Config) -> None:
    silent = changed(base, hardware={"num_devices": None})
    assert resolve.global_batch_size(silent, num_devices=2) == 8
    with pytest.raises(ValueError, match="does not say how many devices there are"):
        resolve.global_batch_size(silent)


@pytest.mark.parametrize("per_device", [0.3, 0.01])
def test_a_batch_that_is_not_whole_is_refused(base: Config, per_device: float) -> None:
    broken = changed(base, train={"per_device_batch_size": per_device})
    with pytest.raises(ValueError, match="not a whole number"):
        resolve.global_batch_size(broken)


def test_a_written_down_batch_survives_other_hardware(base: Config) -> None:
    saved = resolve.with_global_batch(base)
    assert (saved.train.global_batch_size, saved.train.per_device_batch_size) == (32, None)
    elsewhere = changed(saved, hardware={"num_devices": 1})
    assert resolve.global_batch_size(elsewhere) == 32


def test_steps_follow_from_epochs_unless_given(base: Config) -> None:
    assert resolve.max_steps(changed(base, train={"max_steps": 7, "epochs": 9}), 100) == 7
    epochs = changed(base, train={"max_steps": None, "epochs": 3, "global_batch_size": 32})
    assert resolve.max_steps(epochs, 100) == 10  # 300 examples in batches of 32
    assert resolve.max_steps(changed(epochs, train={"max_samples": 32}), 100) == 3
    assert resolve.max_steps(changed(epochs, train={"epochs": 1}), 1) == 1
    with pytest.raises(ValueError, match="set it or train.epochs"):
        resolve.max_steps(changed(base, train={"max_steps": None}), 100)


def test_the_text_encoder_learns_as_fast_as_the_unet_unless_told(base: Config) -> None:
    assert resolve.text_encoder_share(base) == 1
    own = changed(base, optimizer={"text_encoder_lr": base.optimizer.lr / 4, "scale_lr": True})
    assert resolve.text_encoder_share(own) == pytest.approx(0.25)


def test_schedule_steps() -> None:
    cosine = quick(["lr_schedule=cosine", "lr_schedule.warmup_fraction=0.1"])
    assert resolve.decay_steps(cosine, 200) == 200
    assert resolve.warmup_steps(cosine, 200) == 20
    longer = changed(cosine, lr_schedule={"decay_steps": 500})
    assert (resolve.decay_steps(longer, 200), resolve.warmup_steps(longer, 200)) == (500, 50)
    assert resolve.warmup_steps(quick([]), 200) == 0


def test_the_learning_rate_scales_with_the_batch_only_on_request(base: Config) -> None:
    assert resolve.learning_rate(base, 32) == 1e-5
    scaled = changed(base, optimizer={"scale_lr": True})
    assert resolve.learning_rate(scaled, 32) == pytest.approx(3.2e-4)


def test_the_judge_is_off_without_pictures_or_shapes() -> None:
    assert resolve.num_adherence_prompts(quick([])) == 200
    assert resolve.num_adherence_prompts(quick(["sample.every=null"])) == 0
    photos = ["data=imagefolder", "data.dir=photos"]
    assert resolve.num_adherence_prompts(quick(photos)) == 0
