"""The torch side of gpu.py: the same step by torch diffusers, eager, as its training script runs
it: float32 weights, bfloat16 autocast, its default attention (SDPA), AdamW.

Runs in a process of its own and prints a JSON object for each thing found out.
"""

import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from tests.benchmarks.gpu_task import Event, Task, answer_events

WARM_UP = 3
LR, WEIGHT_DECAY, MAX_NORM = 1e-5, 1e-2, 1.0


def events(task: Task) -> Iterator[Event]:
    """What is known, step by step; `absent` where there is no torch, or none for the platform."""
    from sdx.config.compose import compose
    from sdx.config.schema import Platform

    config = compose(task.overrides)
    on_gpu = config.hardware.platform is Platform.gpu
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        yield {"status": "absent", "detail": f"{error}"}
        return
    if on_gpu and not torch.cuda.is_available():
        yield {"status": "absent", "detail": f"torch {torch.__version__} sees no GPU"}
        return
    from tests.benchmarks.torch_step import make_optimizer, make_unet, update

    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(task.seed)
    torch.backends.cudnn.benchmark = True
    unet = make_unet(config.model.unet).to(device)
    optimizer = make_optimizer(unet, LR, WEIGHT_DECAY)
    yield {"software": f"torch {torch.__version__}, diffusers {version('diffusers')}"}

    b, unet_config = task.batch_size, config.model.unet
    side = (config.data.resolution or config.model.resolution) // config.model.vae.factor
    channels = unet_config.in_channels
    tokens = config.model.text_encoder.max_position_embeddings
    moments = torch.randn(b, 2 * channels, side, side, device=device)
    context = torch.randn(b, tokens, unet_config.cross_attention_dim, device=device)
    kept = torch.linspace(0.9999, 0.005, 1000, device=device)  # alphas_cumprod, about

    def one_step() -> Any:
        mean, log_variance = moments.chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)) * 0.18215
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (b,), device=device)
        share = kept[timesteps].view(b, 1, 1, 1)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            given = (noisy, timesteps, context, noise)
            return update(unet, optimizer, *given, max_norm=MAX_NORM)

    def run(num_steps: int) -> tuple[float, Any]:
        """Seconds of a step, and the last loss."""
        start, loss = time.perf_counter(), None
        for _ in range(num_steps):
            loss, _ = one_step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / num_steps, loss

    run(WARM_UP)
    windows = [run(task.steps) for _ in range(task.windows)]
    seconds = [spent for spent, _ in windows]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    yield {
        "step_s": statistics.median(seconds),
        "windows_s": seconds,
        "loss": float(windows[-1][1]),
        "peak_gib": peak,
    }


if __name__ == "__main__":
    answer_events(events)
