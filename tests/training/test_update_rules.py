"""Lion and Adafactor against their formulas in numpy, torch and optax; what optimizers hold."""

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdx.config.compose import compose
from sdx.config.schema import Config, MeshAxes, OptimizerConfig, OptimizerKind
from sdx.parallel import sharding
from sdx.planning.estimate import estimate
from sdx.training import adafactor
from sdx.training.checkpoint import Checkpointer
from sdx.training.optimizer import make_lr_schedule, make_optimizer
from sdx.training.program import build
from sdx.training.state import TrainState
from sdx.training.step import train_step
from tests.micro import cpu, micro_mesh
from tests.training.test_step import make_batch, make_rule, start

FURTHER = [OptimizerKind.adafactor, OptimizerKind.lion]  # AdamW has tests of its own
LR, DECAY = 1e-2, 0.1
SHAPES = {"matrix": (130, 160), "tall": (200, 128), "small": (20, 30), "bias": (7,)}
BYTES_PER_PARAMETER = {"adamw": 8.0, "lion": 4.0, "adafactor": 0.00876}  # README tells them


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def ours(
    kind: str, params: dict[str, Any], num_steps: int, rate: Any = None, **options: Any
) -> dict[str, Any]:
    """The parameters after updates by the gradients `draw(…, 1)`, `draw(…, 2)`, …"""
    config = OptimizerConfig(kind=OptimizerKind[kind], lr=LR, weight_decay=DECAY, **options)
    optimizer = make_optimizer(config, {"unet": rate or (lambda count: jnp.float32(LR))})
    tree: Any = {"unet": jax.tree.map(jnp.asarray, params)}
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    shapes = {name: x.shape for name, x in params.items()}
    for step in range(num_steps):
        grads = {"unet": jax.tree.map(jnp.asarray, draw(shapes, step + 1))}
        changes, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, changes)
    return tree["unet"]


@pytest.mark.fast
def test_lion_is_its_formula() -> None:
    """Algorithm 2 of the paper, at a rate that changes."""
    b1, b2 = 0.9, 0.99
    schedule = compose(["lr_schedule=cosine"]).lr_schedule
    rate = make_lr_schedule(schedule, lr=LR, warmup_steps=2, decay_steps=8)
    params = draw(SHAPES, 0)
    found = ours("lion", params, 6, rate, b1=b1, b2=b2)
    for name, p in params.items():
        theta, m = p.astype(np.float64), np.zeros(p.shape)
        for step in range(6):
            g = draw(SHAPES, step + 1)[name].astype(np.float64)
            c = b1 * m + (1 - b1) * g
            theta = theta - float(rate(jnp.int32(step))) * (np.sign(c) + DECAY * theta)
            m = b2 * m + (1 - b2) * g
        np.testing.assert_allclose(found[name], theta, atol=1e-6, rtol=0)


@pytest.mark.fast
def test_adafactor_is_transformers() -> None:
    """Matrices and vectors; a convolution has its taps in other places there."""
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    shapes = {name: shape for name, shape in SHAPES.items() if name != "small"}
    params = draw(shapes, 0)
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    optimizer = optimization.Adafactor(
        theirs.values(), lr=LR, weight_decay=DECAY, scale_parameter=False, relative_step=False
    )
    for step in range(6):
        for name, grad in draw(shapes, step + 1).items():
            theirs[name].grad = torch.tensor(grad)
        optimizer.step()
    found = ours("adafactor", params, 6)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), atol=1e-6, rtol=0)


@pytest.mark.fast
def test_adafactor_is_optax() -> None:
    """Convolutions too, whose channels are factored in whichever order they lie."""
    shapes = SHAPES | {"widens": (3, 3, 128, 256), "narrows": (1, 3, 256, 128)}
    params = draw(shapes, 0)
    theirs = optax.adafactor(
        LR, multiply_by_parameter_scale=False, weight_decay_rate=LR * DECAY
    )  # there the decay is not times the rate
    tree: Any = jax.tree.map(jnp.asarray, params)
    state, update = theirs.init(tree), jax.jit(theirs.update)
    for step in range(4):
        changes, state = update(jax.tree.map(jnp.asarray, draw(shapes, step + 1)), state, tree)
        tree = optax.apply_updates(tree, changes)
    found = ours("adafactor", params, 4)
    for name in shapes:
        np.testing.assert_allclose(found[name], tree[name], atol=1e-6, rtol=0)


@pytest.mark.fast
def test_a_loud_gradient_moves_no_array_further_than_the_rate() -> None:
    params = {"bias": jnp.zeros(64)}
    changes: Any = None
    config = OptimizerConfig(kind=OptimizerKind.adafactor, lr=LR, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda count: jnp.float32(LR))
    state = optimizer.init(params)
    for scale in (1.0, 1.0, 1000.0):
        changes, state = optimizer.update({"bias": jnp.full(64, scale)}, state, params)
    size = float(jnp.sqrt(jnp.mean(changes["bias"] ** 2)))
    assert size == pytest.approx(LR, rel=1e-5)  # 1.4 times that without clipping


@pytest.mark.fast
@pytest.mark.parametrize("kind", FURTHER)
def test_each_network_has_its_own_rate(kind: OptimizerKind) -> None:
    rates = {"unet": lambda count: jnp.float32(LR), "text_encoder": lambda count: jnp.float32(0)}
    optimizer = make_optimizer(OptimizerConfig(kind=kind, lr=LR), rates)
    params = {name: {"bias": jnp.ones(3)} for name in rates}
    changes: Any = optimizer.update(params, optimizer.init(params), params)[0]
    assert (changes["unet"]["bias"] < 0).all() and (changes["text_encoder"]["bias"] == 0).all()


@pytest.fixture(scope="module")
def sd21() -> Config:
    config = compose(["model=sd21", "hardware=tpu_v4_32"])
    config.hardware, config.mesh.ici = cpu(8), MeshAxes(data=1, fsdp=8)
    return config


@pytest.mark.parametrize("kind", OptimizerKind)
def test_bytes_of_sd21(sd21: Config, kind: OptimizerKind) -> None:
    """What the README tells, what the plan counts, and that nearly all of it is spread."""
    jax.devices()
    sd21.optimizer.kind = kind
    program = build(sd21, micro_mesh(8, data=1, fsdp=8), max_steps=1)
    state = program.abstract_state
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))
    num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    assert held / num_parameters == pytest.approx(BYTES_PER_PARAMETER[kind.name], rel=1e-3)
    leaves = jax.tree.leaves(state)
    whole = [x.size * x.dtype.itemsize for x in leaves if x.sharding.is_fully_replicated]
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    assert sum(whole) / total < (0.002 if kind is OptimizerKind.adafactor else 0.001)
    assert max(whole) < sharding.SMALLEST_SHARDED_BYTES
    planned = estimate(sd21)
    assert planned.sharded_share == pytest.approx(1 - sum(whole) / total)
    assert planned.device_bytes.optimizer == pytest.approx(held / 8, abs=sum(whole))


class Toy:
    """The toy of the step's tests over eight devices, its arrays factored and split."""

    def __init__(self, kind: OptimizerKind, num_devices: int, **axes: int):
        rate = make_rule().rates["lr"]
        options = OptimizerConfig(kind=kind, lr=1e-2)
        rule = make_rule(optimizer=make_optimizer(options, {"unet": rate}))
        mesh = micro_mesh(num_devices, **axes)
        shapes = jax.eval_shape(lambda: start(rule))
        params = sharding.parameter_shardings(shapes.params, mesh)
        places = sharding.state_shardings(shapes, shapes.params, params, mesh)
        self.batch = make_batch()
        self.init = jax.jit(lambda: start(rule), out_shardings=places)
        self.step = jax.jit(partial(train_step, rule), out_shardings=(places, None))
        self.abstract = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )

    def steps(self, state: TrainState, num_steps: int, bad: int = -1) -> TrainState:
        """The state after so many attempts; that of step `bad` is not finite."""
        moments, context, weights = self.batch
        for _ in range(num_steps):
            spoil = jnp.float32("nan") if int(state.step) == bad else jnp.float32(1)
            state, _ = self.step(state, moments, context * spoil, weights)
        return state


@pytest.fixture
def small_arrays_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's arrays are all too small to be factored or split."""
    monkeypatch.setattr(adafactor, "SMALLEST_FACTORED_DIM", 4)
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 16)


@pytest.mark.fast
@pytest.mark.usefixtures("small_arrays_count")
@pytest.mark.parametrize("kind", FURTHER)
def test_a_run_continues_to_the_bit_and_skips_bad_steps(
    kind: OptimizerKind, tmp_path: Path
) -> None:
    toy = Toy(kind, 8, data=1, fsdp=4, tensor=2)
    straight = toy.steps(toy.init(), 4, bad=2)
    assert (int(straight.step), int(straight.num_updates)) == (4, 3)
    with closing(Checkpointer(tmp_path / "checkpoints", keep=2, say=print)) as checkpointer:
        checkpointer.save(2, toy.steps(toy.init(), 2))
        checkpointer.wait()
        restored = checkpointer.restore(toy.abstract)
    assert restored is not None
    continued = toy.steps(restored[1], 2, bad=2)
    assert jax.tree.structure(continued) == jax.tree.structure(straight)
    jax.tree.map(np.testing.assert_array_equal, continued, straight)
    moments = jax.tree.leaves(straight.opt_state)
    assert any(not leaf.sharding.is_fully_replicated for leaf in moments)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in moments)


@pytest.mark.fast
@pytest.mark.usefixtures("small_arrays_count")
@pytest.mark.parametrize("kind", FURTHER)
def test_the_mesh_changes_nothing(kind: OptimizerKind) -> None:
    toys = Toy(kind, 1), Toy(kind, 8, data=2, fsdp=2, tensor=2)
    one, eight = (toy.steps(toy.init(), 3).params for toy in toys)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=0), eight, one)
