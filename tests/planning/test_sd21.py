"""Plans of Stable Diffusion 2.1 and 1.5: figures that others published, and cards they must fit."""

import pytest

from sdx.planning.advice import advise, smallest_bytes
from sdx.planning.estimate import Estimate, at_side, complete, estimate
from tests.config.quick import quick

POD = ("model=sd21", "hardware=tpu_v4_32", "data=pokemon")


@pytest.fixture(scope="module")
def pod() -> Estimate:
    """The model at its own resolution on sixteen chips."""
    return estimate(quick([*POD]))


def test_a_forecast_names_what_it_is_drawn_from() -> None:
    found = estimate(quick(["model=sd21", "hardware=tpu_v5p_8"]))
    assert found.speed.anchor is not None and "MLPerf" in found.speed.anchor.source
    assert found.speed.forecast == pytest.approx(0.455 * 4 * 459e12 / found.work.done)
    v5e = estimate(quick(["model=sd21", "hardware=tpu_v5e_8"])).speed.anchor
    assert v5e is not None and "nothing published" in v5e.source


def test_sd21_on_a_pod_slice(pod: Estimate) -> None:
    assert vars(pod.parameters) == {
        "unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840
    }  # fmt: skip
    assert pod.work.unet_forward == pytest.approx(2 * 1074.6e9, rel=1e-3)
    assert pod.sharded_share >= 0.999
    assert pod.fits == "yes" and pod.host.fits


def test_more_devices_than_a_machine_could_pretend() -> None:
    overrides = ["model=sd21", "hardware=tpu", "hardware.num_devices=4096", "mesh.ici.data=16"]
    found = estimate(quick([*overrides, "mesh=fsdp", "hardware.hbm_gib=32"]))
    assert found.mesh == {"data": 16, "fsdp": 256, "tensor": 1}
    assert found.global_batch_size == 4 * 4096
    assert found.device_bytes.weights < 0.5 * 2**30


def test_the_largest_bucket_counts(pod: Estimate) -> None:
    found = complete(quick([*POD, "data.buckets=true"]), pod.held, pod.level)
    height, width = found.image
    assert height * width > 768 * 768 and height % 64 == width % 64 == 0


def test_multiply_adds_of_512_and_768_pixels(pod: Estimate) -> None:
    at = at_side(pod, 512)
    assert at.work.unet_forward == pytest.approx(2 * 402.1e9, rel=1e-3)
    assert at.device_bytes.total < pod.device_bytes.total
    assert at.device_bytes.state == pod.device_bytes.state


def retyped(found: Estimate, overrides: list[str]) -> Estimate:
    """The estimate of what an advice says to type."""
    return estimate(quick(overrides), found.level)


@pytest.mark.parametrize("model", ["sd15", "sd21"])
@pytest.mark.parametrize("hardware", ["gpu_24gb_1", "gpu_24gb_2"])
def test_cards_of_24_gb_are_told_what_fits(model: str, hardware: str) -> None:
    typed = [f"model={model}", f"hardware={hardware}", "data=pokemon"]
    found = estimate(quick(typed))
    assert found.config.train.ema
    advice = advise(found)
    assert found.fits == "yes" or advice
    for one in advice:
        changed = retyped(found, [*typed, *one.typed])
        assert changed.fits == "yes" and changed.device_bytes.total == one.needs_bytes
        assert changed.global_batch_size == found.global_batch_size


def test_a_copy_on_each_small_chip_is_spread() -> None:
    typed = ["model=sd21", "hardware=tpu_v5e_8", "mesh=dp"]
    found = estimate(quick(typed))
    assert found.fits == "no"
    advice = advise(found)
    assert advice and all(
        any(text.startswith("mesh=") for text in one.typed) and not one.changes_training
        for one in advice
    )


def test_what_must_be_dropped_is_said_to_change_the_training() -> None:
    typed = ["model=sd21", "hardware=gpu_24gb_1", "hardware.hbm_gib=17"]
    found = estimate(quick(typed))
    advice = advise(found)
    assert advice and all(one.changes_training for one in advice)
    assert all({"train.ema=false", "optimizer=adafactor"} & {*one.typed} for one in advice)


@pytest.mark.release
def test_nothing_helps_a_card_that_is_far_too_small() -> None:
    found = estimate(quick(["model=sd21", "hardware=gpu_24gb_1", "hardware.hbm_gib=6"]))
    assert advise(found) == [] and found.usable_bytes is not None
    assert smallest_bytes(found) > found.usable_bytes
