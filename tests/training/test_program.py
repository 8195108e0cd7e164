"""The compiled program: the same numbers cached or fresh, and little Python around it. What meshes,
accumulation and recomputation do to them: test_meshes.py."""

import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sdx.config.schema import (
    ActivationsDtype,
    Cache,
    Config,
    DiffusionConfig,
    PredictionType,
    WeightsDtype,
)
from sdx.data.loader import HostBatch
from sdx.models import flops
from sdx.training import program as programs
from sdx.training.program import BatchError, Program, build
from sdx.training.state import TrainState
from tests.micro import NUM_TOKENS, RESOLUTION, micro_config, micro_mesh

BATCH = 8


def make(config: Config | None = None, num_devices: int = 1, **axes: int) -> Program:
    config = config or micro_config(global_batch_size=BATCH)
    return build(config, micro_mesh(num_devices, **axes), max_steps=10)


def run(program: Program, num_steps: int = 2) -> tuple[TrainState, list[dict[str, float]]]:
    """Steps from the same start on the same pictures, whatever the mesh."""
    state = program.init(**random_networks(program, program.abstract_state.params))
    batch = program.place_batch(pictures())
    moments, context = program.encode(frozen(program), batch)
    history = []
    for _ in range(num_steps):
        state, metrics = program.step(state, moments, context, batch.weights)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def pictures(height: int = RESOLUTION, width: int = RESOLUTION) -> HostBatch:
    rng = np.random.default_rng(0)
    return HostBatch(
        step=0,
        images=rng.integers(0, 256, (BATCH, height, width, 3), dtype=np.uint8),
        tokens=rng.integers(0, 64, (BATCH, NUM_TOKENS), dtype=np.int32),
        weights=np.ones(BATCH, np.float32),
        indices=np.arange(BATCH),
        epochs=np.zeros(BATCH, np.int64),
        bad_images=(),
    )


def frozen(program: Program) -> Any:
    return program.place_frozen(**random_networks(program, program.abstract_frozen))


def random_networks(program: Program, names: Iterable[str]) -> dict[str, Any]:
    """Weights of these networks, the same whether they are trained or frozen."""
    seeds = {"unet": 1, "vae": 2, "text_encoder": 3}
    return {
        name: random_like(getattr(program.networks, name).abstract(), seeds[name]) for name in names
    }


def random_like(abstract: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(leaf.dtype), abstract
    )


@pytest.fixture(scope="module")
def reference() -> tuple[TrainState, list[dict[str, float]]]:
    return run(make().compile())


def with_text_encoder() -> Config:
    config = micro_config(global_batch_size=BATCH, text_encoder=True)
    config.optimizer.text_encoder_lr = 1e-4  # a tenth
    return config


@pytest.fixture(scope="module")
def trained() -> tuple[TrainState, list[dict[str, float]]]:
    """The text encoder is trained too."""
    return run(make(with_text_encoder()).compile())


def test_state_is_where_and_what_the_program_says(
    reference: tuple[TrainState, list[dict[str, float]]],
) -> None:
    program = make()
    assert jax.tree.structure(reference[0]) == jax.tree.structure(program.abstract_state)
    for leaf, like in zip(
        jax.tree.leaves(reference[0]), jax.tree.leaves(program.abstract_state), strict=True
    ):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
    assert program.compile_s is None and program.flops_per_step > 0


@pytest.mark.parametrize("kind", [Cache.moments, Cache.moments_and_context])
def test_what_is_cached_goes_through_the_same_step(kind: Cache) -> None:
    config = micro_config(global_batch_size=BATCH)
    config.data.cache = kind
    program, online = make(config).compile(), make()
    moments, context = online.encode(frozen(online), online.place_batch(pictures()))
    cached = replace(
        pictures(),
        images=None,
        moments=np.asarray(moments, np.float16),
        context=None if kind is Cache.moments else np.asarray(context, np.float16),
    )
    read, states = program.encode(frozen(program), program.place_batch(cached))
    assert read.dtype == states.dtype == jnp.float32
    np.testing.assert_allclose(read, moments, rtol=2**-11, atol=2**-24)
    rtol = 1e-6 if kind is Cache.moments else 2**-11
    np.testing.assert_allclose(states, context, rtol=rtol, atol=2**-24)
    state = program.init(**random_networks(program, program.abstract_state.params))
    _, metrics = program.step(state, read, states, jnp.ones(BATCH))
    _, [expected] = run(online, 1)
    assert float(metrics["loss"]) == pytest.approx(expected["loss"], rel=1e-3)
    assert program.flops_per_step < online.flops_per_step


def test_bfloat16_computes_and_float32_keeps(
    reference: tuple[TrainState, list[dict[str, float]]],
) -> None:
    config = micro_config(global_batch_size=BATCH)
    config.model.activations_dtype = ActivationsDtype.bfloat16
    state, history = run(make(config), num_steps=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert history[0]["loss"] == pytest.approx(reference[1][0]["loss"], rel=1e-2)
    assert history[0]["loss"] != reference[1][0]["loss"]


def test_a_cached_program_says_the_same_to_the_last_bit(
    reference: tuple[TrainState, list[dict[str, float]]], tmp_path: Path
) -> None:
    state, history = reference
    for _ in range(2):  # compiled and stored, then read back
        jax.clear_caches()
        with compilation_cache(tmp_path):
            again, said = run(make().compile())
        assert said == history
        jax.tree.map(np.testing.assert_array_equal, again, state)
    assert list(tmp_path.iterdir()), "nothing was cached"


class compilation_cache:
    """An empty cache folder in place of the tests' shared one."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        self.before = jax.config.values["jax_compilation_cache_dir"]
        self._set(str(self.folder))

    def __exit__(self, *_: object) -> None:
        self._set(self.before)

    def _set(self, folder: str | None) -> None:
        jax.config.update("jax_compilation_cache_dir", folder)
        reset_cache()


def test_random_start_is_a_function_of_the_seed() -> None:
    program = make()
    first, again = program.init(), program.init()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = replace(program, rule=replace(program.rule, seed=1)).init()
    kernel = "conv_in"
    assert not np.array_equal(
        first.params["unet"][kernel]["kernel"], other.params["unet"][kernel]["kernel"]
    )
    assert first.ema is not None
    jax.tree.map(np.testing.assert_array_equal, first.params, first.ema)


def test_a_frozen_text_encoder_is_no_part_of_the_step() -> None:
    """Neither argument nor constant, and not one operation of it is traced."""
    steps = {}
    for text_encoder in (False, True):
        config = micro_config(global_batch_size=BATCH, text_encoder=text_encoder)
        config.model.text_encoder.vocab_size = 61  # a shape that nothing else has
        program = make(config)
        assert ("text_encoder" in program.abstract_state.params) is text_encoder
        assert ("text_encoder" in program.abstract_frozen) is not text_encoder
        encode, step = program.lower()
        assert jnp.issubdtype(encode.out_info[1].dtype, jnp.integer) is text_encoder
        steps[text_encoder] = step.as_text()
    assert "tensor<61x8xf32>" in steps[True] and "61x8" not in steps[False]


def test_training_the_text_encoder_starts_from_the_same_loss(
    reference: tuple[TrainState, list[dict[str, float]]],
    trained: tuple[TrainState, list[dict[str, float]]],
) -> None:
    (first, second), (frozen_first, frozen_second) = trained[1], reference[1]
    assert first["loss"] == pytest.approx(frozen_first["loss"], rel=1e-6)
    assert first["grad_norm"] > frozen_first["grad_norm"]  # one norm over both
    assert second["loss"] != frozen_second["loss"]
    assert "lr_text_encoder" not in frozen_first


def test_the_text_encoder_has_its_own_rate_and_average(
    trained: tuple[TrainState, list[dict[str, float]]],
) -> None:
    state, (metrics, _) = trained
    assert metrics["lr"] == pytest.approx(1e-3)
    assert metrics["lr_text_encoder"] == pytest.approx(1e-4)
    before = random_networks(make(with_text_encoder()), state.params)
    for name, rate in (("unet", 1e-3), ("text_encoder", 1e-4)):
        changes = [
            np.abs(np.asarray(new) - old)
            for new, old in zip(
                jax.tree.leaves(state.params[name]), jax.tree.leaves(before[name]), strict=True
            )
        ]
        largest = max(x.max() for x in changes)  # two updates, each of about its rate
        assert rate < largest < 2.1 * rate
    assert state.ema is not None and state.ema.keys() == state.params.keys()
    average, newest = (tree["text_encoder"] for tree in (state.ema, state.params))
    kernels = [tree["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"] for tree in (average, newest)]
    assert 0 < float(jnp.abs(kernels[0] - kernels[1]).max()) < 1e-4


def test_work_counts_what_is_trained_and_looked_at() -> None:
    config = micro_config(global_batch_size=BATCH)
    plain = make(config).flops_per_step
    text, latent = flops.text_flops(config.model.text_encoder), RESOLUTION // 2
    assert make(with_text_encoder()).flops_per_step == pytest.approx(plain + BATCH * 2 * text)
    config.diffusion = DiffusionConfig(dream=1.0, prediction_type=PredictionType.epsilon)
    unet = flops.unet_forward_flops(config.model.unet, latent, latent)
    assert make(config).flops_per_step == pytest.approx(plain + BATCH * unet)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_trained_weights_are_stored_as_asked_and_frozen_ones_in_float32(text_encoder: bool) -> None:
    config = micro_config(global_batch_size=BATCH, text_encoder=text_encoder)
    config.model.weights_dtype = WeightsDtype.bfloat16
    program = make(config)
    for params, dtype in (
        (program.abstract_state.params, jnp.bfloat16),
        (program.abstract_frozen, jnp.float32),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(
        BatchError, match="global_batch_size=6: must be a multiple .* = 4; use 4 or 8"
    ):
        make(micro_config(global_batch_size=6), num_devices=4)


def dispatch_s() -> float:
    """Seconds of this thread's processor, so that a busy machine does not count, that the quickest
    of 200 dispatches takes."""
    program = make()
    params = {"unet": {str(i): jnp.zeros(4) for i in range(686)}}
    state = programs.initial_state(params, program.rule.optimizer, ema=True)
    idle = jax.jit(
        lambda state, *_: (replace(state, step=state.step + 1), {"loss": jnp.float32(0)}),
        donate_argnums=0,
    )
    inputs = [jnp.zeros(1) for _ in range(3)]
    compiled = idle.lower(state, *inputs).compile()
    times = []
    for _ in range(200):
        start = time.thread_time()
        state, _ = compiled(state, *inputs)
        times.append(time.thread_time() - start)
    return min(times)


def test_python_takes_little_of_a_step(repository: Path) -> None:
    """Dispatch of 686 weights with their average and moments stays under 10 ms.

    In a process of its own, as a run is: behind 2,000 tests the same took 10.6 ms, alone 4.7.
    """
    script = "from tests.training.test_program import dispatch_s; print(dispatch_s())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.010, f"{1e3 * float(done.stdout):.1f} ms"


def test_each_bucket_has_its_program_and_a_step_its_mean_operations() -> None:
    """Both shapes train one state, as the program compiled when it is called does."""
    shares = {(8, 16): 0.25, (RESOLUTION, RESOLUTION): 0.75}
    config, mesh = micro_config(global_batch_size=BATCH), micro_mesh()
    program = build(config, mesh, max_steps=10, buckets=shares)
    wide = build(config, mesh, max_steps=10, buckets={(8, 16): 1.0}).flops_per_step
    square = make(config).flops_per_step
    assert program.flops_per_step == pytest.approx(0.25 * wide + 0.75 * square)
    assert 0.3 * square < wide < 0.6 * square
    shapes = [
        batch.images.shape[1:3] for batch in program.abstract_batches if batch.images is not None
    ]
    assert shapes == [*shares]
    losses = []
    for each in (program.compile(), program):
        state = each.init(**random_networks(each, each.abstract_state.params))
        for size in [*shares, *shares]:
            batch = each.place_batch(pictures(*size))
            moments, context = each.encode(frozen(each), batch)
            state, metrics = each.step(state, moments, context, batch.weights)
            losses.append(float(metrics["loss"]))
        assert int(state.step) == 4
    assert losses[:4] == losses[4:] and len(set(losses)) == 4
