"""The exact part of an estimate is measured against a run; what follows from it is arithmetic."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sdx.config.errors import ConfigError
from sdx.config.schema import Cache, HardwareConfig, MeshAxes, Platform, Remat
from sdx.models import flops
from sdx.parallel import sharding
from sdx.planning.arrays import tpu_numbers
from sdx.planning.compiled import GIB
from sdx.planning.estimate import JAX_GPU_FRACTION, Estimate, complete, estimate, usable_bytes
from sdx.training.program import BatchError, build
from tests.config.quick import quick
from tests.micro import RESOLUTION, cpu, micro_config, micro_mesh

CHIP = HardwareConfig(
    name="chip",
    platform=Platform.tpu,
    device_kind="TPU v9",
    num_devices=4,
    num_hosts=2,
    hbm_gib=0.5,
    peak_tflops=10.0,
    hbm_gbps=100.0,
)


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
    batch = allocated(program.abstract_batch)
    for device in jax.devices()[:8]:
        parts = found.device_bytes
        assert parts.weights == held(state.params, device)
        assert parts.ema == held(state.ema, device)
        assert parts.state == held(state, device)
        assert parts.frozen == held(frozen, device)
        assert parts.placed == 2 * held(batch, device)
        assert parts.resident == parts.state + parts.frozen + parts.placed + parts.encoded
    leaves = jax.tree.leaves(state)
    split = [leaf for leaf in leaves if not leaf.is_fully_replicated]
    whole = sum(leaf.nbytes for leaf in leaves)
    assert found.checkpoint_bytes == whole
    assert found.sharded_share == pytest.approx(sum(leaf.nbytes for leaf in split) / whole)
    assert 0.5 < found.sharded_share < 1
    replicated = [leaf.nbytes for leaf in leaves if leaf.is_fully_replicated]
    assert sorted(found.placement.whole.values()) == sorted(replicated)
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2} and found.num_devices == 8
    assert state.params.keys() == ({"unet", "text_encoder"} if text_encoder else {"unet"})
    for name, params in (state.params | frozen).items():
        assert getattr(found.parameters, name) == sum(x.size for x in jax.tree.leaves(params))
    assert (found.usable_bytes, found.fits, found.speed.roofline) == (None, "undecided", None)


def allocated(abstract: Any) -> Any:
    """Real arrays where and what the program says."""
    return jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract
    )


def held(tree: Any, device: Any) -> int:
    """Bytes of `tree` that lie on `device`."""
    shards = [x for leaf in jax.tree.leaves(tree) for x in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [  # of arguments in layouts that XLA chose for TPU v4
        ((3, 3, 320, 320), 9 * 320 * 384),
        ((1024, 320), 1024 * 320),
        ((4, 64, 64, 8), 4 * 64 * 8 * 128),
        ((3, 3, 4, 320), 9 * 4 * 384),
        ((320,), 512),
        ((1280,), 2048),
        ((), 128),
    ],
)
def test_arrays_as_a_tpu_stores_them(shape: tuple[int, ...], numbers: int) -> None:
    assert tpu_numbers(shape) == numbers


@pytest.mark.fast
def test_hardware_that_is_not_here_is_planned_for(planned: Estimate) -> None:
    assert planned.num_devices == 4 and planned.per_device_batch_size == 2
    assert planned.sharded_share == 0 and planned.device_bytes.ema == 0
    latent, unet = RESOLUTION // 2, micro_config().model.unet
    forward = flops.unet_forward_flops(unet, latent, latent, num_tokens=8)
    assert planned.work.unet_forward == forward
    assert planned.work.unet_training == 3 * forward < planned.work.image
    fastest = 4 * 10e12 / planned.work.done
    assert planned.speed.roofline is not None and planned.speed.roofline <= fastest


@pytest.mark.fast
def test_the_slower_of_compute_and_memory_bounds(planned: Estimate) -> None:
    def bound(**hardware: float | None) -> tuple[str | None, float | None]:
        config = replace(planned.config, hardware=replace(CHIP, **hardware))
        found = complete(config, planned.held, planned.level)
        return found.speed.bound_by, found.speed.roofline

    fastest = 4 * 10e12 / planned.work.done
    assert bound(hbm_gbps=1e6) == ("compute", pytest.approx(fastest))
    name, slow = bound(hbm_gbps=1.0)
    assert name == "memory" and bound(hbm_gbps=2.0)[1] == pytest.approx(2 * (slow or 0))
    assert bound(peak_tflops=None) == (None, None)


@pytest.mark.fast
def test_recomputing_is_the_hardwares_work_not_the_models(planned: Estimate) -> None:
    train = replace(planned.config.train, remat=Remat.blocks)
    again = estimate(replace(planned.config, train=train))
    assert again.work.image == planned.work.image
    assert again.work.done == planned.work.done + planned.work.unet_forward
    assert again.device_bytes.step.activations < planned.device_bytes.step.activations


def spare(found: Estimate, count: int) -> Estimate:
    """The same run on devices that leave so many bytes beside the estimate."""
    memory = (found.device_bytes.total + count) / GIB
    hardware = replace(found.config.hardware, hbm_gib=memory)
    return estimate(replace(found.config, hardware=hardware))


@pytest.mark.fast
def test_yes_no_and_a_margin_between(planned: Estimate) -> None:
    assert planned.margin_bytes == planned.device_bytes.temporaries // 4
    assert spare(planned, -1000).fits == "no"
    assert spare(planned, 1000).fits == "undecided"
    assert spare(planned, planned.margin_bytes + 1000).fits == "yes"


@pytest.mark.fast
def test_programs_may_not_have_all_of_a_gpus_memory() -> None:
    config = quick(["hardware=gpu_24gb_1"])
    assert config.xla.memory_fraction is not None and config.hardware.hbm_gib is not None
    whole = config.hardware.hbm_gib * GIB
    assert usable_bytes(config) == int(whole * config.xla.memory_fraction)
    config.xla.memory_fraction = None
    assert usable_bytes(config) == int(whole * JAX_GPU_FRACTION)


@pytest.mark.fast
def test_programs_may_have_all_that_a_tpu_is_said_to_have() -> None:
    config = quick(["hardware=tpu_v4_8"])
    assert usable_bytes(config) == int(30.75 * GIB)  # of 32, in libtpu's words


@pytest.mark.fast
def test_encoding_takes_whole_updates_and_nothing_from_a_cache(planned: Estimate) -> None:
    def encode(pieces: int, cache: Cache = Cache.none) -> int:
        config = replace(planned.config, data=replace(planned.config.data, cache=cache))
        train = replace(config.train, gradient_accumulation=pieces)
        return estimate(replace(config, train=train)).device_bytes.encode

    assert encode(1) == encode(2) > 0 == encode(1, Cache.moments)


@pytest.mark.fast
def test_what_cannot_be_planned(planned: Estimate) -> None:
    config = replace(planned.config, hardware=replace(CHIP, num_devices=None))
    with pytest.raises(ConfigError, match=r"num_devices: missing.*hardware\.num_devices=N"):
        estimate(config)
    train = replace(planned.config.train, global_batch_size=12)
    with pytest.raises(BatchError, match="use 8 or 16"):
        estimate(replace(planned.config, train=train))
