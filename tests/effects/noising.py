"""`diffusion.*`: what is drawn, added, asked for and weighed, by the program's own rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pytest import approx

from sdx.training.step import Examples, draw_examples, step_key, stream
from tests.effects.effect import Case, Effect
from tests.effects.tracing import Observer

ROWS = 4096  # examples of which frequencies and deviations are counted
LAST_SIGMA = (1 - 0.0046600) ** 0.5  # of Stable Diffusion's schedule, at its last timestep


def drawn(case: Case, mean: float = 0.0) -> Examples:
    """A large batch of the first step, of latents that are all `mean` before they are scaled."""
    moments = jnp.concatenate(
        [jnp.full((ROWS, 2, 2, 4), mean), jnp.full((ROWS, 2, 2, 4), -30.0)], -1
    )
    return draw_examples(
        case.program.rule, jnp.int32(0), moments, jnp.zeros((ROWS, 1, 1)), jnp.ones(ROWS)
    )


def target(case: Case) -> str:
    """What the UNet is to output, of latents that are 1: told by its mean and deviation."""
    found = drawn(case, mean=1.0)
    signal, sigma = case.program.rule.objective.schedule.coefficients(found.timesteps)
    noise = np.asarray((found.noisy - signal) / sigma)
    known = {"noise": noise, "latents": np.ones_like(noise), "velocity": signal * noise - sigma}
    asked = np.asarray(found.target)
    [name] = [name for name, one in known.items() if np.allclose(one, asked, atol=1e-3)]
    return name


def betas(*timesteps: int) -> Observer:
    """Of the schedule that trains."""
    return lambda case: [float(case.program.rule.objective.schedule.betas[t]) for t in timesteps]


def last_signal(case: Case) -> float:
    """Cumulative product of 1 - beta at the last timestep."""
    return float(case.program.rule.objective.schedule.alphas_cumprod[-1])


def share_of_timesteps(below: int) -> Observer:
    """How many of the timesteps drawn lie below this one, of all."""
    return lambda case: float(np.mean(np.asarray(drawn(case).timesteps) < below))


def largest_timestep(case: Case) -> float:
    return round(int(drawn(case).timesteps.max()), -1)


def loss_weight(case: Case) -> float:
    """Of an example at timestep 0."""
    return float(case.program.rule.objective.weigh(jnp.ones(1), jnp.zeros(1, jnp.int32))[0])


def variance_of_channel_means(case: Case) -> float:
    """Of the noise, whose channels have 4 latents each."""
    return float(jnp.var(drawn(case).target.mean((1, 2))))


def hidden_noise(case: Case) -> float:
    """Deviation of the noise in the input from that of the target."""
    found = drawn(case)
    _, sigma = case.program.rule.objective.schedule.coefficients(found.timesteps)
    return float(jnp.std(found.noisy / sigma - found.target))


def rectified(case: Case) -> list[float]:
    """Input 0 and target 1 at the last timestep, of a network that predicts 0."""
    pixel, last = jnp.zeros((1, 1, 1, 1)), jnp.full(1, 999)
    pair = case.program.rule.objective.rectify(jnp.zeros_like, pixel, pixel + 1, last)
    return [float(one[0, 0, 0, 0]) for one in pair]


def first_timesteps(case: Case) -> list[int]:
    """Of the first step, four examples."""
    rule = case.program.rule
    key = stream(step_key(rule.seed, jnp.int32(0)), "timesteps")
    return [int(t) for t in rule.objective.draw_timesteps(key, 4)]


def of_seed(seed: int) -> list[int]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 1)  # step, stream
    return [int(t) for t in jax.random.randint(key, (4,), 0, 1000)]


def about(number: float) -> Any:
    """A share among `ROWS`, or a deviation of as many draws."""
    return approx(number, abs=0.03)


BIAS = "diffusion.timestep_bias."
EARLIER = (BIAS + "strategy=earlier", BIAS + "multiplier=3")
RANGE = (BIAS + "strategy=range", BIAS + "multiplier=999")
EPSILON = ("diffusion.prediction_type=epsilon",)

EFFECTS = [
    Effect("model.prediction_type", "epsilon", target, "velocity", "noise"),
    Effect("diffusion.prediction_type", "sample", target, "velocity", "latents"),
    Effect(
        "model.vae.scaling_factor",
        "0.5",
        lambda case: float(drawn(case, mean=3.0).target.mean()),
        approx(3.0, rel=1e-5),
        approx(1.5, rel=1e-5),
        given=("diffusion.prediction_type=sample",),
    ),
    Effect("diffusion.num_train_timesteps", "500", largest_timestep, 1000, 500),
    Effect(
        "diffusion.beta_schedule",
        "linear",
        betas(0, 500, 999),
        approx([0.00085, (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * 500 / 999) ** 2, 0.012]),
        approx([0.00085, 0.00085 + (0.012 - 0.00085) * 500 / 999, 0.012]),
    ),
    Effect(
        "diffusion.beta_start",
        "0.001",
        betas(0, 999),
        approx([0.00085, 0.012]),
        approx([0.001, 0.012]),
    ),
    Effect(
        "diffusion.beta_end",
        "0.02",
        betas(0, 999),
        approx([0.00085, 0.012]),
        approx([0.00085, 0.02]),
    ),
    Effect(
        "diffusion.rescale_zero_terminal_snr",
        "true",
        last_signal,
        approx(0.0046600, abs=1e-6),
        0,
        given=("diffusion.timestep_spacing=trailing",),
    ),
    Effect(
        "diffusion.snr_gamma",
        "5",
        loss_weight,
        1.0,
        approx(
            5 * 0.00085, rel=1e-3
        ),  # of velocity min(snr, 5) / (snr + 1), 1 / (snr + 1) = beta_0
    ),
    Effect(
        BIAS + "strategy",
        "earlier",
        share_of_timesteps(250),
        about(0.25),
        about(0.5),  # 3 x 250 of 3 x 250 + 750
        along=(BIAS + "multiplier=3",),
    ),
    Effect(
        BIAS + "multiplier", "9", share_of_timesteps(250), about(0.5), about(0.75), given=EARLIER
    ),
    Effect(
        BIAS + "portion", "0.5", share_of_timesteps(250), about(0.5), about(0.375), given=EARLIER
    ),
    Effect(
        BIAS + "begin",
        "1",
        share_of_timesteps(1),
        about(999 / (2 * 999 + 998)),
        about(1 / (999 + 999)),
        given=(*RANGE, BIAS + "end=1"),
    ),
    Effect(
        BIAS + "end",
        "0",  # inclusive
        share_of_timesteps(1),
        about(999 / (2 * 999 + 998)),
        about(999 / (999 + 999)),
        given=(*RANGE, BIAS + "end=1"),
    ),
    Effect(
        "diffusion.noise_offset",
        "1.0",
        variance_of_channel_means,
        about(1 / 4),
        approx(1 / 4 + 1, abs=0.05),
        given=EPSILON,
    ),
    Effect(
        "diffusion.input_perturbation",
        "0.1",
        hidden_noise,
        approx(0, abs=1e-4),
        approx(0.1, rel=0.02),
        given=EPSILON,
    ),
    Effect(
        "diffusion.dream",
        "2",
        rectified,
        [0, 1],
        approx([LAST_SIGMA**3, 1 + LAST_SIGMA**2], rel=1e-5),
        given=EPSILON,
    ),
    Effect("run.seed", "7", first_timesteps, of_seed(0), of_seed(7)),
]
