"""The estimate of a run is measured against the run."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdx.config.errors import ConfigError
from sdx.config.schema import HardwareConfig, MeshAxes, Platform
from sdx.models import flops
from sdx.parallel import sharding
from sdx.planning.estimate import GIB, DeviceBytes, Estimate, PlanError, estimate
from sdx.planning.report import render
from sdx.training.program import build
from tests.micro import RESOLUTION, cpu, micro_config, micro_mesh

pytestmark = pytest.mark.fast

CHIP = HardwareConfig(
    name="chip",
    platform=Platform.tpu,
    device_kind="TPU v9",
    num_devices=4,
    num_hosts=2,
    hbm_gib=0.5,
    peak_tflops=10.0,
)


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """JAX has the devices of the other tests before an estimate claims more."""
    jax.devices()


@pytest.fixture(scope="module")
def planned() -> Estimate:
    """A run on chips that are not here, of a length that data decides which is not here either."""
    length: dict[str, Any] = {"max_steps": None, "epochs": 2}
    config = micro_config(global_batch_size=16, gradient_accumulation=2, ema=False, **length)
    config.hardware = CHIP
    return estimate(config)


@pytest.mark.parametrize("word", ["frozen", "trained"])
def test_bytes_are_those_of_a_real_state(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 256)  # the micro-model's are smaller
    text_encoder = word == "trained"
    config = micro_config(global_batch_size=16, text_encoder=text_encoder)
    config.hardware, config.mesh.ici = cpu(8), MeshAxes(data=2, fsdp=2, tensor=2)
    found = estimate(config)
    program = build(config, micro_mesh(8, data=2, fsdp=2, tensor=2), max_steps=10)
    state, frozen = allocated(program.abstract_state), allocated(program.abstract_frozen)
    for device in jax.devices()[:8]:
        weights = held(state.params, device)
        assert found.device_bytes == DeviceBytes(
            weights=weights,
            ema=held(state.ema, device),
            optimizer=held(state, device) - held((state.params, state.ema), device),
            gradients=weights,
            frozen=held(frozen, device),
        )
    leaves = jax.tree.leaves(state)
    split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    whole = sum(leaf.nbytes for leaf in leaves)
    assert found.checkpoint_bytes == whole
    assert found.sharded_share == pytest.approx(sum(leaf.nbytes for leaf in split) / whole)
    assert 0.5 < found.sharded_share < 1
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2} and found.num_devices == 8
    assert state.params.keys() == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    for name, params in (state.params | frozen).items():
        assert getattr(found.parameters, name) == sum(x.size for x in jax.tree.leaves(params))
    assert f"{found.parameters.text_encoder:,} parameters, {word}" in render(found)
    assert (found.fits, found.max_images_per_s) == ("unknown", None)


def allocated(abstract: Any) -> Any:
    """Real arrays where and what the program says."""
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract
    )


def held(tree: Any, device: Any) -> int:
    """Bytes of `tree` that lie on `device`."""
    shards = [x for leaf in jax.tree.leaves(tree) for x in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_copies_hold_everything_and_no_average_costs_nothing(planned: Estimate) -> None:
    held = planned.device_bytes
    assert planned.sharded_share == 0 and held.ema == 0
    assert held.weights == held.gradients == 4 * planned.parameters.unet
    assert held.optimizer == 2 * held.weights + 5 * 4  # four counters of the state, one of AdamW
    assert held.total == 4 * held.weights + 5 * 4 + held.frozen


def test_hardware_that_is_not_here_is_planned_for(planned: Estimate) -> None:
    assert (planned.num_devices, planned.num_hosts) == (4, 2)
    assert planned.per_device_batch_size == 2
    latent, unet = RESOLUTION // 2, micro_config().model.unet
    assert planned.flops_per_step > 3 * 16 * flops.unet_forward_flops(unet, latent, latent)
    assert planned.flops_per_device == planned.flops_per_step / 4
    assert planned.max_images_per_s == pytest.approx(16 * 4 * 10e12 / planned.flops_per_step)
    assert planned.hbm_bytes == GIB // 2
    assert "2 on each device in each of 2 micro-steps" in render(planned)


@pytest.mark.parametrize(
    ("spare", "fits", "line"),
    [
        (None, "unknown", "hardware.hbm_gib is not given"),
        (0, "undecided", "activations come on top"),
        (-1, "no", "even without activations; mesh=fsdp spreads the state"),
    ],
)
def test_it_never_says_yes(planned: Estimate, spare: int | None, fits: str, line: str) -> None:
    hbm_bytes = None if spare is None else planned.device_bytes.total + spare
    found = replace(planned, hbm_bytes=hbm_bytes)
    assert found.fits == fits
    assert line in render(found)


def test_the_number_of_devices_must_be_known_and_makeable() -> None:
    config = micro_config(global_batch_size=16)
    config.hardware = replace(CHIP, num_devices=None)
    with pytest.raises(ConfigError, match=r"num_devices: missing.*hardware\.num_devices=N"):
        estimate(config)
    available = len(jax.devices())
    config.hardware = replace(CHIP, num_devices=2 * available)
    with pytest.raises(PlanError, match=f"with {available} CPU devices"):
        estimate(config)
