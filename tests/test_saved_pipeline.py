"""What `Pipeline.save` writes, diffusers loads; both draw the same picture from it."""

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdx
from sdx.pipeline import Pipeline
from sdx.weights.export import ExportError
from tests.weights.conftest import complete, make_reference

torch = pytest.importorskip("torch")
PROMPTS = ["a red fox!", "fog"]
# As trained for each kind, and one with everything overridden.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "1.x": ("sd1", {"_class_name": "PNDMScheduler", "skip_prk_steps": True}),
    "2.x": ("sd2", {}),
    "2.x, other noise": (
        "sd2",
        {
            "_class_name": "DDIMScheduler",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "beta_end": 0.013,
        },
    ),
}


one_kind = pytest.mark.parametrize("pipe", ["2.x"], indirect=True)


@pytest.fixture(scope="module", params=list(SCHEDULERS))
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    kind, scheduler = SCHEDULERS[request.param]
    folder = tmp_path_factory.mktemp("model")
    return sdx.load(complete(make_reference(kind, folder), **scheduler))


def load_in_diffusers(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):  # the libraries' own
        diffusers: Any = import_module("diffusers")
        judge = diffusers.StableDiffusionPipeline.from_pretrained(folder, **options)
    judge.set_progress_bar_config(disable=True)
    return judge


def drawn_by(judge: Any, latents: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):
        drawn = judge(
            PROMPTS,
            num_inference_steps=6,
            guidance_scale=5.0,
            latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
            output_type="np",
        )
    return drawn.images


def test_diffusers_draws_the_same_picture(pipe: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    pipe.save(folder)
    judge = load_in_diffusers(folder)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4), dtype=np.float32)
    theirs = drawn_by(judge, latents)
    ours = pipe.sample(PROMPTS, num_steps=6, guidance_scale=5.0, latents=latents)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=0.1 / 255)
    assert theirs.std() > 0.05

    tokens = judge.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77)
    np.testing.assert_array_equal(tokens["input_ids"], pipe.tokenize(PROMPTS))
    with torch.no_grad():
        states = judge.text_encoder(torch.tensor(tokens["input_ids"])).last_hidden_state
    np.testing.assert_allclose(pipe.encode_text(pipe.tokenize(PROMPTS)), states, atol=1e-5)
    assert judge.safety_checker is None and judge.feature_extractor is None
    assert judge.unet.config.sample_size == 8

    again = sdx.load(folder).sample(PROMPTS, num_steps=6, guidance_scale=5.0, latents=latents)
    np.testing.assert_array_equal(again, ours)


@one_kind
def test_half_precision_is_loaded_as_float32_unless_asked(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path / "half", dtype="float16")
    judge = load_in_diffusers(tmp_path / "half")
    assert {judge.unet.dtype, judge.vae.dtype, judge.text_encoder.dtype} == {torch.float32}


@one_kind
def test_the_drawn_size_is_what_the_folder_says(pipe: Pipeline, tmp_path: Path) -> None:
    larger = Pipeline(**{**vars(pipe), "latent_shape": (12, 12, 4)})
    larger.save(tmp_path / "larger")
    assert json.loads((tmp_path / "larger/unet/config.json").read_text())["sample_size"] == 12
    assert sdx.load(tmp_path / "larger").latent_shape == (12, 12, 4)


@one_kind
def test_only_its_own_folder_is_replaced(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save(tmp_path / "out")
    pipe.save(tmp_path / "out")
    with pytest.raises(ExportError, match="dtype=int8: use float32, float16, bfloat16"):
        pipe.save(tmp_path / "out", dtype="int8")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="notes.txt"):
        pipe.save(tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()
