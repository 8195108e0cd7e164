"""The sdx side of gpu.py: compiles the step of a configuration, times it, says where its time went.

Runs in a process of its own and prints a JSON object for each thing found out, as soon as it is: a
process that is cut short has said what it knew.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_task import Event, Task, answer_events
from tests.benchmarks.trace_shares import parts_of, seconds_by_part

WARM_UP = 3
TRACED = 3


def events(task: Task) -> Iterator[Event]:
    """What is known, step by step; the last is where the time went. `absent` where JAX sees no
    GPU."""
    from sdx.config.compose import compose
    from sdx.config.schema import Platform
    from sdx.parallel.xla_flags import flags_in_force, set_flags

    config = compose(task.overrides)
    set_flags(config.xla, config.hardware, task.cache, say=print)  # before JAX is imported
    import jax

    from sdx.config import resolve
    from sdx.models import flops
    from sdx.models.attention_choice import describe
    from sdx.parallel.mesh import claim_devices, make_mesh
    from sdx.training.program import attention_of, build

    _keep_compiled(task.cache)
    claim_devices(config.hardware)
    device = jax.devices()[0]
    if config.hardware.platform is Platform.gpu and device.platform != "gpu":
        detail = f"jax {jax.__version__} sees no GPU; for its plugin pip install 'sdx[cuda]'"
        yield {"status": "absent", "detail": detail}
        return
    hardware = replace(config.hardware, device_kind=device.device_kind)
    mesh = make_mesh(config.mesh, hardware, jax.devices()[:1])
    program = build(config, mesh, max_steps=1)
    side = resolve.resolution(config) // resolve.vae_factor(config)
    yield {
        "device": device.device_kind,
        "software": f"jax {jax.__version__}",
        "flags": flags_in_force(),
        "attention": describe(attention_of(config, mesh), config.model, side),
        "gflops_per_image": 3 * flops.unet_forward_flops(config.model.unet, side, side) / 1e9,
        "peak_tflops": config.hardware.peak_tflops,
    }

    start = time.perf_counter()
    encode, lowered = program.lower()
    step = lowered.compile()
    memory: Any = step.memory_analysis()
    yield {
        "compile_s": time.perf_counter() - start,
        "temp_gib": memory.temp_size_in_bytes / 2**30,
        "donated": memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes,
    }

    random = Random(task.seed)
    place = lambda leaf: jax.device_put(random.like(leaf), leaf.sharding)  # noqa: E731
    state = program.init(**jax.tree.map(place, program.abstract_state.params))
    batch = jax.tree.map(place, program.abstract_batch)
    batch = batch._replace(weights=batch.weights * 0 + 1)
    moments, context = (place(random.sharded(out, mesh)) for out in encode.out_info)

    def one_step(state: Any) -> Any:
        return step(state, moments, context, batch.weights)

    state, metrics = _run(one_step, state, WARM_UP)
    state, seconds = _time(one_step, state, task)
    yield {
        "step_s": statistics.median(seconds),
        "windows_s": seconds,
        "loss": float(metrics["loss"]),
        "bad_steps": float(metrics["num_bad_steps"]),
        "peak_gib": _peak_gib(device),
    }
    if task.shares:
        state, shares = _shares(one_step, state, parts_of(step.as_text() or ""))
        yield shares
    if task.captions:
        encoded, frozen = encode.compile(), jax.tree.map(place, program.abstract_frozen)

        def with_captions(state: Any) -> Any:
            return step(state, *encoded(frozen, batch), batch.weights)

        state, _ = _run(with_captions, state, 1)
        state, seconds = _time(with_captions, state, task)
        yield {"step_with_captions_s": statistics.median(seconds)}


class Random:
    """Numbers for weights and inputs, cheaply: zeros would draw less power, and so run faster."""

    def __init__(self, seed: int):
        import numpy as np

        self._pool = np.random.default_rng(seed).standard_normal(2**22, dtype=np.float32)

    def like(self, leaf: Any) -> Any:
        """Weights that keep a signal's size; integers below 1,000."""
        import numpy as np

        numbers = np.resize(self._pool, leaf.shape)
        if np.issubdtype(leaf.dtype, np.integer):
            return (np.abs(numbers) * 200).astype(leaf.dtype) % 1000
        fan_in = max(1, leaf.size // leaf.shape[-1]) if len(leaf.shape) in (2, 4) else 1
        is_weight = fan_in < 2**20 and len(leaf.shape) in (2, 4)
        return (numbers / fan_in**0.5 if is_weight else numbers).astype(leaf.dtype)

    def sharded(self, like: Any, mesh: Any) -> Any:
        """`like` with a place."""
        import jax

        from sdx.parallel.sharding import batch_sharding

        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=batch_sharding(mesh))


def _time(step: Callable[[Any], Any], state: Any, task: Task) -> tuple[Any, list[float]]:
    """Seconds of a step, one number for each window of steps that nothing waited for within."""
    seconds = []
    for _ in range(task.windows):
        start = time.perf_counter()
        state, _ = _run(step, state, task.steps)
        seconds.append((time.perf_counter() - start) / task.steps)
    return state, seconds


def _run(step: Callable[[Any], Any], state: Any, num_steps: int) -> tuple[Any, dict[str, Any]]:
    """The state after so many steps, and the metrics of the last, once they are computed."""
    import jax

    metrics: dict[str, Any] = {}
    for _ in range(num_steps):
        state, metrics = step(state)
    return jax.block_until_ready((state, metrics))


def _shares(step: Callable[[Any], Any], state: Any, parts: dict[str, str]) -> tuple[Any, Event]:
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, _ = _run(step, state, TRACED)
        seconds = seconds_by_part(Path(folder), parts)
    total = sum(seconds.values())
    shares = {part: spent / total for part, spent in seconds.items()} if total else {}
    return state, {"shares": shares, "busy_s": total / TRACED}


def _keep_compiled(folder: str) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser().absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _peak_gib(device: Any) -> float | None:
    found = device.memory_stats()
    return found["peak_bytes_in_use"] / 2**30 if found else None


if __name__ == "__main__":
    answer_events(events)
