"""Times a training step of sdx against torch diffusers: same weights, same inputs, same threads.

    python tests/benchmarks/step.py [--steps N] [--threads N] [--small]

Each side is a process of its own, and only one computes at a time: inside one process the idle
OpenMP threads of torch spin on the cores that XLA's pool wants, and the other way round. Steps
alternate, so that both meet the same weather on a shared machine. Exit code 1 where loss or
gradient norm of any step disagree by more than 1e-4 relative: then it was not the same work.

Ours is `training.step.train_step`, as it trains, the noise it draws and its check for bad steps
included; the examples it draws are what torch gets. torch runs eager: forward, mean squared error,
backward, clip_grad_norm_, AdamW. Both keep freed memory (`sdx.parallel.memory`; torch's time does
not change by it).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
SEED = 0
LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 1e-2, 1.0
TOKENS = 77


@dataclass(frozen=True)
class Size:
    """One UNet and its batch, in diffusers' terms."""

    channels: tuple[int, ...]
    heads: tuple[int, ...]
    layers: int
    context: int
    batch: int
    side: int
    groups: int = 32


FULL = Size((64, 128, 256, 256), (1, 2, 4, 4), 2, context=256, batch=4, side=32)
MICRO = Size((8, 16), (1, 2), 1, context=8, batch=2, side=8, groups=4)


@dataclass(frozen=True)
class Step:
    """What one side says of one step."""

    loss: float
    grad_norm: float
    wall_s: float
    cpu_s: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each side (12)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (all)")
    parser.add_argument("--small", action="store_true", help="a micro UNet: only proves agreement")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the sdx side")
    options = parser.parse_args()
    return compare(MICRO if options.small else FULL, options.steps, options.threads, options.python)


def compare(size: Size, steps: int, threads: int, python: str = sys.executable) -> int:
    """Runs both sides, prints what they say, returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        pinned = sorted(os.sched_getaffinity(0))[:threads]
        torch = Worker("torch", sys.executable, size, folder, pinned, steps)
        sdx = Worker("sdx", python, size, folder, pinned, steps)
        sides = {"sdx": sdx, "torch": torch}
        about = {"torch": torch.ask("weights"), "sdx": sdx.ask("compile")}
        torch.ask("inputs")
        pairs = [(Step(**sdx.ask("step")), Step(**torch.ask("step"))) for _ in range(steps + 1)]
        for side in sides.values():
            side.close()
    print(f"{_cpu_name()}, {len(pinned)} threads")
    print("\n".join(f"{name}: {said}" for name, said in about.items()))
    return report(pairs)


def report(pairs: list[tuple[Step, Step]]) -> int:
    """Prints every step and the medians without the first; 1 where the two sides disagree."""
    worst = 0.0
    for number, (ours, theirs) in enumerate(pairs):
        for name in ("loss", "grad_norm"):
            a, b = getattr(ours, name), getattr(theirs, name)
            error = abs(a - b) / abs(b)
            worst = max(worst, error if error == error else float("inf"))
        print(
            f"step {number}: loss {ours.loss:.7f} {theirs.loss:.7f}  "
            f"grad norm {ours.grad_norm:.6f} {theirs.grad_norm:.6f}  "
            f"wall {ours.wall_s:.3f} {theirs.wall_s:.3f}"
        )
    timed = pairs[1:]
    for name in ("wall_s", "cpu_s"):
        ours, theirs = (statistics.median(getattr(p[side], name) for p in timed) for side in (0, 1))
        ratios = sorted(getattr(a, name) / getattr(b, name) for a, b in timed)
        print(
            f"{name}: sdx {ours:.3f}, torch {theirs:.3f}, ratio {ours / theirs:.2f} "
            f"(of pairs: {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    print(f"largest relative difference of loss and gradient norm: {worst:.1e}")
    return 0 if worst <= TOLERANCE else 1


class Worker:
    """One side in its own process; answers one line of JSON to one word."""

    def __init__(
        self, side: str, python: str, size: Size, folder: str, cores: list[int], steps: int
    ):
        threads = str(len(cores))
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
        task = {"size": asdict(size), "folder": folder, "cores": cores, "steps": steps + 1}
        self._process = subprocess.Popen(
            [python, __file__, "--worker", side, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, word: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended at {word!r} with code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def work(side: str, task: dict[str, Any]) -> None:
    """A worker: cores first, so that thread pools are made for them."""
    os.sched_setaffinity(0, task["cores"])
    from sdx.parallel.memory import keep_freed_memory

    keep_freed_memory()
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    run = {"sdx": run_sdx, "torch": run_torch}[side]
    script = run(Size(**task["size"]), Path(task["folder"]), len(task["cores"]), task["steps"])
    for _, answer in zip(sys.stdin, script, strict=False):
        print(json.dumps(answer), file=answers, flush=True)


def run_sdx(size: Size, folder: Path, threads: int, steps: int) -> Iterator[Any]:
    """Compiles the step, leaves its inputs for torch, then steps."""
    import jax
    import jax.numpy as jnp

    from sdx.config.schema import (
        AttentionConfig,
        DiffusionConfig,
        Platform,
        PredictionType,
        Remat,
    )
    from sdx.diffusion.objective import make_objective
    from sdx.models.attention_choice import select_attention
    from sdx.models.module import nested, pure
    from sdx.models.unet import UNet2DConditionModel
    from sdx.training.optimizer import adamw
    from sdx.training.state import initial_state
    from sdx.training.step import StepRule, draw_examples, train_step
    from sdx.weights.names import array_from_torch, from_torch

    unet = pure(
        lambda rngs: UNet2DConditionModel(
            unet_config(size),
            attention=select_attention(AttentionConfig(), Platform.cpu, dtype="float32"),
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            precision=jax.lax.Precision.DEFAULT,
            remat=Remat.none,
            rngs=rngs,
        )
    )
    lr: Callable[[Any], Any] = lambda count: jnp.float32(LR)  # noqa: E731
    rule = StepRule(
        predict=lambda params, *inputs: unet.apply(params["unet"], *inputs),
        objective=make_objective(DiffusionConfig(), PredictionType.epsilon),
        scaling_factor=1.0,
        optimizer=adamw(lr, 0.9, 0.999, eps=1e-8, decay=WEIGHT_DECAY),
        rates={"lr": lr},
        max_grad_norm=MAX_NORM,
        ema_decay=0.0,
        seed=SEED,
    )
    files = np.load(folder / "weights.npz")
    weights = {from_torch(n): jnp.asarray(array_from_torch(n, files[n])) for n in files.files}
    state = initial_state({"unet": nested(weights)}, rule.optimizer, ema=False)
    random = np.random.default_rng(SEED)
    shapes = [(size.batch, size.side, size.side, 8), (size.batch, TOKENS, size.context)]
    moments, context = (jnp.asarray(random.standard_normal(s, dtype=np.float32)) for s in shapes)
    batch = (moments, context, jnp.ones(size.batch))
    draw = jax.jit(lambda step: draw_examples(rule, step, *batch))
    drawn = [draw(jnp.int32(i)) for i in range(steps)]
    names = ("noisy", "target", "timesteps", "conditioning")
    arrays: dict[str, Any] = {
        f"{n}{i}": np.asarray(getattr(d, n)) for i, d in enumerate(drawn) for n in names
    }
    np.savez(folder / "inputs.npz", **arrays)

    start = time.perf_counter()
    step = jax.jit(lambda s, *b: train_step(rule, s, *b), donate_argnums=0)
    compiled = step.lower(state, *batch).compile()
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    compile_s = time.perf_counter() - start
    overhead = f"{1e3 * _overhead_s(len(jax.tree.leaves(state))):.1f} ms"
    yield f"{versions}, compiled in {compile_s:.1f} s, Python overhead of a call {overhead}"
    for _ in range(steps):
        watch = Watch()
        state, metrics = compiled(state, *batch)
        jax.block_until_ready((state, metrics))
        yield watch.read(float(metrics["loss"]), float(metrics["grad_norm"]))


def _overhead_s(num_arrays: int) -> float:
    """Median CPU of the calling thread for a donating call over so many tiny arrays: what a step's
    call costs besides its work, which XLA:CPU partly does in the same thread."""
    import jax
    import jax.numpy as jnp

    state = [jnp.zeros(4) for _ in range(num_arrays)]
    call = jax.jit(lambda arrays: [x + 1 for x in arrays], donate_argnums=0)
    times = []
    for _ in range(20):
        start = time.thread_time()
        state = call(state)
        times.append(time.thread_time() - start)
        jax.block_until_ready(state)
    return statistics.median(times)


def run_torch(size: Size, folder: Path, threads: int, steps: int) -> Iterator[Any]:
    """Makes the weights, takes the inputs, then steps."""
    import torch

    from tests.benchmarks.torch_step import make_optimizer, make_unet, update

    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    unet = make_unet(unet_config(size))
    parameters = dict(unet.named_parameters())
    arrays: dict[str, Any] = {n: p.detach().numpy() for n, p in parameters.items()}
    np.savez(folder / "weights.npz", **arrays)
    count = sum(p.numel() for p in parameters.values())
    diffusers = importlib.metadata.version("diffusers")
    yield f"torch {torch.__version__}, diffusers {diffusers}, {count:,} parameters"

    files = np.load(folder / "inputs.npz")

    def read(name: str, number: int) -> torch.Tensor:
        array = torch.from_numpy(files[f"{name}{number}"])
        return array.permute(0, 3, 1, 2).contiguous() if array.ndim == 4 else array

    names = ("noisy", "target", "timesteps", "conditioning")
    batches = [[read(name, number) for name in names] for number in range(steps)]
    optimizer = make_optimizer(unet, LR, WEIGHT_DECAY)
    yield "ready"
    for noisy, target, timesteps, context in batches:
        watch = Watch()
        loss, norm = update(unet, optimizer, noisy, timesteps, context, target, max_norm=MAX_NORM)
        yield watch.read(loss.item(), norm.item())


def unet_config(size: Size) -> Any:
    """`size` in the words of the configuration."""
    from sdx.config.schema import DownBlock, UNetConfig

    kinds = [DownBlock.CrossAttnDownBlock2D] * (len(size.channels) - 1) + [DownBlock.DownBlock2D]
    return UNetConfig(
        sample_size=size.side,
        block_out_channels=list(size.channels),
        layers_per_block=size.layers,
        down_block_types=kinds,
        attention_head_dim=list(size.heads),
        cross_attention_dim=size.context,
        norm_num_groups=size.groups,
    )


class Watch:
    """Wall and CPU seconds since it was made; CPU of all threads, the kernel's share included."""

    def __init__(self) -> None:
        self._cpu, self._wall = _cpu_s(), time.perf_counter()

    def read(self, loss: float, grad_norm: float) -> dict[str, float]:
        wall_s, cpu_s = time.perf_counter() - self._wall, _cpu_s() - self._cpu
        return asdict(Step(loss, grad_norm, wall_s, cpu_s))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main())
