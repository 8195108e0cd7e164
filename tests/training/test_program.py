"""The compiled program: the same numbers on any mesh, with any remat, cached or fresh, and little
Python around it."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sdx.config.schema import ActivationsDtype, Config, Remat
from sdx.parallel import sharding
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
    state = program.init(**starting_weights(program))
    rng = np.random.default_rng(0)
    batch = program.place_batch(
        rng.integers(0, 256, (BATCH, RESOLUTION, RESOLUTION, 3), dtype=np.uint8),
        rng.integers(0, 64, (BATCH, NUM_TOKENS), dtype=np.int32),
        np.ones(BATCH, np.float32),
    )
    moments, context = program.encode(frozen(program), batch.images, batch.tokens)
    history = []
    for _ in range(num_steps):
        state, metrics = program.step(state, moments, context, batch.weights)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def starting_weights(program: Program) -> Any:
    return random_like(program.abstract_state.params, seed=1)


def frozen(program: Program) -> Any:
    return program.place_frozen(**random_like(program.abstract_frozen, seed=2))


def random_like(abstract: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(leaf.dtype), abstract
    )


@pytest.fixture(scope="module")
def reference() -> tuple[TrainState, list[dict[str, float]]]:
    return run(make().compile())


@pytest.fixture
def shards_small_arrays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The micro-model's arrays are all under the size from which arrays are shared."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 256)
    yield


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


def test_eight_devices_say_what_one_says(
    reference: tuple[TrainState, list[dict[str, float]]], shards_small_arrays: None
) -> None:
    program = make(num_devices=8, data=2, fsdp=2, tensor=2)
    state, history = run(program)
    for ours, expected in zip(history, reference[1], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    kernel = state.params["unet"]["mid_block"]["resnets"]["0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    moments: Any = state.opt_state
    query = moments.mu["unet"]["mid_block"]["attentions"]["0"]["transformer_blocks"]["0"]["attn1"][
        "to_q"
    ]["kernel"]
    assert query.addressable_shards[0].data.size == query.size // 4


@pytest.mark.parametrize(
    "change",
    [{"gradient_accumulation": 2}, {"remat": Remat.blocks}],
    ids=lambda change: str(change),
)
def test_memory_is_saved_without_changing_the_numbers(
    reference: tuple[TrainState, list[dict[str, float]]], change: dict[str, Any]
) -> None:
    _, history = run(make(micro_config(global_batch_size=BATCH, **change)))
    for ours, expected in zip(history, reference[1], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


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


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(
        BatchError, match="global_batch_size=6: must be a multiple .* = 4; use 4 or 8"
    ):
        make(micro_config(global_batch_size=6), num_devices=4)


@pytest.mark.fast
def test_python_takes_little_of_a_step() -> None:
    """Dispatch of 686 weights with their average and moments stays under 10 ms."""
    program = make()
    params = {"unet": {str(i): jnp.zeros(4) for i in range(686)}}
    state = programs.initial_state(params, program.rule.optimizer, ema=True)
    idle = jax.jit(
        lambda state, *_: (replace(state, step=state.step + 1), {"loss": jnp.float32(0)}),
        donate_argnums=0,
    )
    inputs = [jnp.zeros(1) for _ in range(3)]
    compiled = idle.lower(state, *inputs).compile()
    times = []  # of this thread's processor: a busy machine must not fail the test
    for _ in range(20):
        start = time.thread_time()
        state, _ = compiled(state, *inputs)
        times.append(time.thread_time() - start)
    assert min(times) < 0.010, f"{1e3 * min(times):.1f} ms"
