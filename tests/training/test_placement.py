"""What each device holds of Stable Diffusion's state: bytes to the last one, on meshes that are not
here."""

from collections.abc import Mapping

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from sdx.config.schema import Config, OptimizerConfig, OptimizerKind
from sdx.models.attention import dot_product_attention
from sdx.models.networks import Networks, make_networks
from sdx.parallel.mesh import AXES
from sdx.parallel.sharding import SMALLEST_SHARDED_BYTES, Placement, placement
from sdx.training.optimizer import make_optimizer
from sdx.training.program import abstract_arrays
from tests.config.quick import quick


@pytest.fixture(scope="module", params=["sd21", "sd15"])
def model(request: pytest.FixtureRequest) -> tuple[Config, Networks]:
    config = quick([f"model={request.param}", "train.text_encoder=true"])
    networks = make_networks(
        config.model, attention=dot_product_attention, dtype="float32", trains_text_encoder=True
    )
    return config, networks


def table(
    model: tuple[Config, Networks], shape: tuple[int, int, int], kind: OptimizerKind
) -> Mapping[str, Placement]:
    """By part of the state, frozen networks included, over a mesh of these sizes."""
    config, networks = model
    mesh = AbstractMesh(shape, AXES, (AxisType.Auto,) * 3)
    names = ("unet", "text_encoder")
    optimizer = make_optimizer(OptimizerConfig(kind=kind), dict.fromkeys(names, jnp.float32))
    state, frozen = abstract_arrays(config, mesh, networks, optimizer)
    return {
        **{name: placement(state.params[name]) for name in names},
        "ema": placement(state.ema),
        "optimizer": placement(state.opt_state),
        "vae": placement(frozen["vae"]),
        "state": placement(state),
    }


BYTES = {
    ("sd21", 8): {
        "unet": (3463642896, 434589456, 1867536),
        "text_encoder": (1361551360, 171272704, 1232896),
        "ema": (4825194256, 605862160, 3100432),
        "optimizer": (9650388516, 1211724324, 6200868),
        "vae": (334615452, 42082204, 291740),
        "state": (19300777044, 2423448660, 12401748),
    },
    ("sd21", 16): {
        "unet": (3463642896, 218228496, 1867536),
        "text_encoder": (1361551360, 86252800, 1232896),
        "ema": (4825194256, 304481296, 3100432),
        "optimizer": (9650388516, 608962596, 6200868),
        "vae": (334615452, 21186972, 291740),
        "state": (19300777044, 1217925204, 12401748),
    },
    ("sd15", 8): {
        "unet": (3438083856, 431394576, 1867536),
        "text_encoder": (492241920, 61954944, 485376),
        "ema": (3930325776, 493349520, 2352912),
        "optimizer": (7860651556, 986699044, 4705828),
        "vae": (334615452, 42082204, 291740),
        "state": (15721303124, 1973398100, 9411668),
    },
    ("sd15", 16): {
        "unet": (3438083856, 216631056, 1867536),
        "text_encoder": (492241920, 31220160, 485376),
        "ema": (3930325776, 247851216, 2352912),
        "optimizer": (7860651556, 495702436, 4705828),
        "vae": (334615452, 21186972, 291740),
        "state": (15721303124, 991404884, 9411668),
    },
}
"""In all, on each device, and of those in arrays that every device holds whole."""


@pytest.mark.parametrize("fsdp", [8, 16])
def test_bytes_of_each_device_under_fsdp(model: tuple[Config, Networks], fsdp: int) -> None:
    """At least 99.9 % of every part is shared, and nothing of 64 KiB or more lies whole."""
    found = table(model, (1, fsdp, 1), OptimizerKind.adamw)
    assert BYTES[model[0].model.name, fsdp] == {
        name: (part.total, part.on_device, sum(part.whole.values())) for name, part in found.items()
    }
    for part in found.values():
        assert part.sharded_share >= 0.999
        assert max(part.whole.values()) < SMALLEST_SHARDED_BYTES


@pytest.mark.parametrize("kind", [OptimizerKind.lion, OptimizerKind.adafactor])
def test_other_optimizers_on_64_devices(
    model: tuple[Config, Networks], kind: OptimizerKind
) -> None:
    """Adafactor's means are many and small: a tenth of them is shared, and all are 11 MB."""
    found = table(model, (4, 16, 1), kind)
    optimizer, whole = found["optimizer"], found["state"].whole
    assert max(whole.values()) < SMALLEST_SHARDED_BYTES
    if kind is OptimizerKind.lion:
        assert found["state"].sharded_share > 0.999
        assert optimizer.on_device == found["ema"].on_device + 4  # a moment each, and the count
    else:
        assert optimizer.total < 12e6 and optimizer.on_device < 10e6
        assert found["state"].sharded_share > 0.998


# The UNet's bytes on a device of (1, 4, 2), and of (1, 4, 1).
WIDTH = {"sd21": (743018256, 867311376), "sd15": (739823376, 860921616)}


def test_width_is_shared_too(model: tuple[Config, Networks]) -> None:
    """Over `tensor` go the transformers' products, 28 to 29 % of the UNet; the rest is fsdp's."""
    found = table(model, (1, 4, 2), OptimizerKind.adamw)
    unet, halved = found["unet"], table(model, (1, 4, 1), OptimizerKind.adamw)["unet"]
    assert unet.sharded_share > 0.999
    by_width, by_fsdp = WIDTH[model[0].model.name]
    assert (unet.on_device, halved.on_device) == (by_width, by_fsdp)
