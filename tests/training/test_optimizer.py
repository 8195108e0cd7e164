"""Learning rates, clipping and EMA against diffusers and torch, run live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import LrScheduleConfig, LrScheduleKind
from sdx.training.optimizer import clip, ema_decay, make_lr_schedule

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kind", LrScheduleKind)
@pytest.mark.parametrize(
    ("warmup", "total", "options"),
    [(0, 100, {}), (10, 100, {"num_cycles": 3, "power": 2.0}), (30, 40, {})],
)
def test_schedules_are_diffusers(
    kind: LrScheduleKind, warmup: int, total: int, options: dict[str, float]
) -> None:
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("diffusers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    names = {"cosine_with_restarts": ["num_cycles"], "polynomial": ["power"]}.get(kind.name, [])
    theirs = optimization.get_scheduler(
        kind.name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        **{name: options[name] for name in names if name in options},
    )
    # diffusers ignores the warm-up of `constant`; sdx resolves it to 0 and refuses to be given one
    ours = make_lr_schedule(
        LrScheduleConfig(kind=kind, **options),  # type: ignore[arg-type]
        lr=1e-4,
        warmup_steps=0 if kind is LrScheduleKind.constant else warmup,
        decay_steps=total,
    )
    rates = jax.jit(jax.vmap(ours))(jnp.arange(total))
    expected = []
    for _ in range(total):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose(rates, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", LrScheduleKind)
def test_a_decayed_rate_stays_at_its_end(kind: LrScheduleKind) -> None:
    rate = make_lr_schedule(LrScheduleConfig(kind=kind), lr=1e-4, warmup_steps=0, decay_steps=10)
    end = {"constant": 1e-4, "constant_with_warmup": 1e-4, "polynomial": 1e-7}.get(kind.name, 0.0)
    for count in (10, 15, 20, 1000):
        assert float(rate(jnp.int32(count))) == pytest.approx(end, rel=1e-6)


def test_ema_decay_is_diffusers() -> None:
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("diffusers.training_utils").EMAModel
    theirs = model([torch.nn.Parameter(torch.zeros(1))], decay=0.99)
    counts = jnp.arange(2000)
    expected = [theirs.get_decay(int(count) + 1) for count in counts]
    np.testing.assert_allclose(jax.vmap(lambda n: ema_decay(n, 0.99))(counts), expected, rtol=1e-6)
    assert expected[0] == 0 and expected[1] == pytest.approx(0.1818, abs=1e-4)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_is_torchs(scale: float) -> None:
    torch = pytest.importorskip("torch")
    grads = [scale * np.random.default_rng(i).normal(size=(3, 4)).astype("f") for i in range(2)]
    parameters = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.tensor(grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    ours = clip([jnp.asarray(grad) for grad in grads], jnp.float32(norm.item()), 1.0)
    for mine, parameter in zip(ours, parameters, strict=True):
        np.testing.assert_allclose(mine, parameter.grad.numpy(), rtol=1e-6)
