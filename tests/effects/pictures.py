"""`sampler.kind`, `sample.*` and what of `diffusion.*` only pictures show: what a run draws.

Gallery, pipeline and sampler are a run's own. The networks stand in for themselves: the state of a
text is its number of letters over 100, the UNet outputs one number, and the pictures are the
latents, which Euler's last step makes that number (prediction type sample).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytest import approx

from sdx.experiment import gallery as galleries
from sdx.experiment.attempt import Attempt
from sdx.experiment.gallery import Gallery
from sdx.pipeline import Pipeline
from tests.effects.effect import Case, Effect

TOKENS, SIDE = 77, 2


def text_state(params: Any, latents: Any, timesteps: Any, context: Any) -> Any:
    """The state of the text it is told, and its opposite in every other latent."""
    signs = jnp.where(jnp.arange(SIDE * SIDE * 4) % 2, -1.0, 1.0).reshape(1, SIDE, SIDE, 4)
    return context[:, :1, :1, None] * signs


def timestep(params: Any, latents: Any, timesteps: Any, context: Any) -> Any:
    """The timestep it is asked at, in thousands."""
    return jnp.broadcast_to(timesteps[:, None, None, None] / 1000, latents.shape)


def noise(params: Any, latents: Any, timesteps: Any, context: Any) -> Any:
    """The latents it is given."""
    return latents


@dataclass(frozen=True)
class Drawn:
    """A grid: its prompts and its pictures, which are latents."""

    prompts: Sequence[str]
    pictures: np.ndarray


def drawn(case: Case, predict: Callable[..., Any]) -> Drawn:
    """The grid that a run would draw at its end."""
    found: list[Drawn] = []

    def keep(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        found.append(Drawn(prompts, pictures))
        return np.zeros((1, 1, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(galleries, "make_grid", keep)
        patch.setattr(galleries, "to_uint8", lambda images: images)
        patch.setattr(galleries, "save_png", lambda image, path: None)
        gallery = Gallery(
            case.config, case.setup.paths, _pipeline(case, predict), [], lambda: False
        )
        gallery.draw_grid(case.setup.max_steps, {})
    return found[0]


def _pipeline(case: Case, predict: Callable[..., Any]) -> Pipeline:
    """A run's own, around stand-ins."""
    attempt: Any = SimpleNamespace(setup=case.setup)
    frozen: Any = {"unet": {}, "vae": {}, "text_encoder": {}}
    made = Attempt._pipeline(attempt, case.program, frozen)
    functions = replace(
        made.functions,
        encode_text=lambda params, tokens: tokens[..., None].astype(jnp.float32) / 100,
        decode_latents=lambda params, latents: latents,
        rule=replace(made.functions.rule, predict=predict),
    )
    return replace(made, functions=functions, tokenizer=_Letters())


class _Letters:
    """Every token is the number of letters."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(text)] * TOKENS for text in texts], np.int32)


def text_shown(case: Case) -> float:
    """How far the pictures say what they are told, in letters over 100."""
    return float(drawn(case, text_state).pictures[0].max())


def last_timestep(case: Case) -> float:
    """The last one that the UNet is asked at, in thousands."""
    return float(drawn(case, timestep).pictures[0].mean())


def seed(case: Case) -> int:
    """Whose noise the first picture starts from."""
    signs = np.sign(drawn(case, noise).pictures)
    noises = {seed: jax.random.normal(jax.random.key(seed), signs.shape) for seed in range(8)}
    [found] = [seed for seed, one in noises.items() if np.array_equal(np.sign(one), signs)]
    return found


EULER = ("sampler=euler", "diffusion.prediction_type=sample", "sample.num_steps=4")
FOUR = (*EULER, "sample.prompts=[four]", "sample.guidance_scale=3")
DDIM = ("diffusion.prediction_type=sample", "sample.num_steps=4")

EFFECTS = [
    Effect(
        "sample.prompts",
        "[a,bb]",
        lambda case: drawn(case, text_state).prompts,
        ["four"],
        ["a", "bb"],
        given=FOUR,
    ),
    Effect("sample.guidance_scale", "5", text_shown, approx(0.12), approx(0.2), given=FOUR),
    Effect(
        "sample.negative_prompt",
        "'no'",
        text_shown,
        approx(0.12),
        approx(0.02 + 3 * (0.04 - 0.02)),
        given=FOUR,
    ),
    Effect(
        "sample.guidance_rescale",
        "0.5",
        text_shown,
        approx(0.12),
        approx(0.5 * 0.12 + 0.5 * 0.04),  # half with the contrast of the unguided
        given=FOUR,
    ),
    Effect("sample.seed", "5", seed, 0, 5, given=(*FOUR, "sample.num_steps=1")),
    Effect(
        "sample.num_steps",
        "10",
        last_timestep,
        approx(0.249),  # of 1000 timesteps in 4 steps
        approx(0.099),
        given=(*EULER, "diffusion.timestep_spacing=trailing"),
    ),
    Effect(
        "diffusion.timestep_spacing",
        "trailing",
        last_timestep,
        approx(0.001),
        approx(0.249),
        given=EULER,
    ),
    Effect(
        "sampler.kind",
        "dpmpp_2m",  # counts one step more than it takes
        last_timestep,
        approx(0.001),
        approx(0.201),
        given=EULER,
    ),
    Effect(
        "diffusion.class_name",
        "EulerDiscreteScheduler",
        last_timestep,
        approx(0.18, abs=0.05),  # DDIM ends at the first noise level: some of timestep 251 is left
        approx(0.001),
        given=DDIM,
    ),
]
