"""The loss of torch's trainer and of sdx, step by step on the same draws.

    python -m tests.parity.loss_curve [--steps N] [--plot FILE]

torch trains first, in the order of diffusers' examples/text_to_image/train_text_to_image.py, and
writes down what it drew: latents, noise, timesteps and token ids of every step. sdx starts from the
same files and trains on that. Both models come from a seed; nothing is downloaded.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray

from sdx.config.schema import LrScheduleConfig, LrScheduleKind, OptimizerConfig, OptimizerKind
from sdx.training.program import build
from sdx.training.step import Examples, update
from sdx.weights.load import load_text_encoder, load_unet
from tests.micro import micro_config, micro_mesh
from tests.parity.sides import quickly, script_loss
from tests.weights.conftest import NUM_TOKENS, Reference, make_reference

NUM_STEPS, NUM_STRICT, TOLERANCE = 200, 50, 1e-5
NUM_IMAGES, SIDE, BATCH_SIZE, VOCABULARY = 16, 16, 4, 99
LR, WARMUP_STEPS, SEED = 1e-3, 10, 0


@dataclass(frozen=True)
class Recording:
    """What torch drew at each step, NHWC, and the loss it had."""

    latents: NDArray[np.float32]
    noise: NDArray[np.float32]
    timesteps: NDArray[np.int32]
    tokens: NDArray[np.int32]
    losses: NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"of training ({NUM_STEPS})")
    parser.add_argument("--plot", type=Path, help="where to draw both curves (PNG)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_reference("sd2", Path(folder))
        recording = record(model, options.steps)
        ours = replay(model, recording)
    differences = np.abs(ours - recording.losses)
    for end in (NUM_STRICT, options.steps):
        print(f"largest difference of the first {end} steps: {differences[:end].max():.1e}")
    if options.plot:
        draw(recording.losses, ours, options.plot)


def record(model: Reference, num_steps: int) -> Recording:
    """Trains `model.unet` with torch; the other networks stay as they are."""
    diffusers = import_module("diffusers")
    parameters = list(model.unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-2)
    schedule = diffusers.optimization.get_scheduler(
        "constant_with_warmup", optimizer, num_warmup_steps=WARMUP_STEPS
    )
    rows: list[tuple[Any, ...]] = []
    for latents, noise, timesteps, tokens in _draws(model, num_steps):
        with torch.no_grad():
            context = model.text_encoder(tokens)[0]
        loss = script_loss(
            model.unet,
            latents,
            noise,
            timesteps,
            context,
            prediction_type="v_prediction",
            snr_gamma=None,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        pictures = (x.permute(0, 2, 3, 1).numpy() for x in (latents, noise))
        numbers = (x.numpy().astype(np.int32) for x in (timesteps, tokens))
        rows.append((*pictures, *numbers, np.float64(loss.item())))
    return Recording(*map(np.stack, zip(*rows, strict=True)))


def _draws(model: Reference, num_steps: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each step: scaled latents of smooth pictures, noise, timesteps, token ids."""
    random = torch.Generator().manual_seed(SEED)
    coarse = torch.rand(NUM_IMAGES, 3, 4, 4, generator=random) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    captions = torch.randint(VOCABULARY, (NUM_IMAGES, NUM_TOKENS), generator=random)
    for _ in range(num_steps):
        chosen = torch.randint(NUM_IMAGES, (BATCH_SIZE,), generator=random)
        with torch.no_grad():
            posterior = model.vae.encode(images[chosen]).latent_dist
        latents = posterior.sample(random) * model.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=random)
        timesteps = torch.randint(1000, (BATCH_SIZE,), generator=random)
        yield latents, noise, timesteps, captions[chosen]


def replay(model: Reference, recording: Recording) -> NDArray[np.float64]:
    """The losses of sdx, from `model`'s folder, on what torch drew."""
    config = replace(
        micro_config(),
        model=model.model,
        optimizer=OptimizerConfig(kind=OptimizerKind.adamw, lr=LR),
        lr_schedule=LrScheduleConfig(
            kind=LrScheduleKind.constant_with_warmup, warmup_steps=WARMUP_STEPS
        ),
    )
    program = build(config, micro_mesh(), max_steps=len(recording.losses))
    rule, text = program.rule, program.networks.text_encoder
    state = program.init(unet=load_unet(model.files, program.networks.unet.abstract()))
    encode = partial(jax.jit(text.apply), load_text_encoder(model.files, text.abstract()))
    losses: list[float] = []
    step = None
    for latents, noise, timesteps, tokens in zip(
        *map(jnp.asarray, (recording.latents, recording.noise)),
        *map(jnp.asarray, (recording.timesteps, recording.tokens)),
        strict=True,
    ):
        examples = Examples(
            noisy=rule.objective.schedule.add_noise(latents, noise, timesteps),
            target=rule.objective.target(latents, noise, timesteps),
            timesteps=timesteps,
            conditioning=encode(tokens),
            weights=jnp.full(BATCH_SIZE, 1 / BATCH_SIZE),
        )
        step = step or quickly(partial(update, rule), state, examples)
        state, metrics = step(state, examples)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def draw(theirs: NDArray[np.float64], ours: NDArray[np.float64], path: Path) -> None:
    """Both curves, and below them how far they are apart."""
    with warnings.catch_warnings(action="ignore"):
        pyplot: Any = import_module("matplotlib.pyplot")
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 4.2), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    steps = np.arange(1, len(ours) + 1)
    above.plot(steps, theirs, color="#f0883e", linewidth=3, label="torch, diffusers' script")
    above.plot(steps, ours, color="#1f6feb", linewidth=1, label="sdx")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    differences = np.abs(ours - theirs)
    apart = differences > 0  # a logarithm shows no zeros
    below.semilogy(steps[apart], differences[apart], ".", color="#57606a", markersize=3)
    below.hlines(TOLERANCE, 1, NUM_STRICT, color="#cf222e", linewidth=1)
    below.annotate("bound 1e-5", (NUM_STRICT, TOLERANCE), color="#cf222e", va="center", size=8)
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(1, len(ours))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
