"""The embedded model: what ships in sdx/assets/tiny, judged by diffusers, transformers and eye."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.assets.make_text_encoder import VALUES, describe
from sdx.assets.make_text_encoder import make_network as make_text_encoder
from sdx.assets.make_tiny import write_configs
from sdx.assets.make_tokenizer import byte_letters, caption_words, learn_merges, write_tokenizer
from sdx.assets.make_vae import make_network as make_vae
from sdx.assets.make_vae import to_signed
from sdx.config.compose import compose
from sdx.config.schema import Config
from sdx.data.adherence import measure_adherence
from sdx.data.shapes import ShapesSource, combinations
from sdx.data.tokenizer import Tokenizer, load_tokenizer
from sdx.models.module import Params
from sdx.weights.load import load_text_encoder, load_vae
from sdx.weights.model_files import open_model

TEXTS = [
    "a small red circle on a blue background",
    "",
    "A Photo of YODA!! don't",
    "ünïcödé 😀 \x00 日本語\n tab\t<|endoftext|>",
    "word " * 100,
]


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["model=tiny", "data=shapes", "hardware=cpu"])


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(__file__).resolve().parents[2] / "sdx" / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def vae(config: Config, folder: Path) -> Params:
    return load_vae(
        open_model(str(folder), components=["vae"]), make_vae(config.model.vae).abstract()
    )


@pytest.fixture(scope="module")
def text_encoder(config: Config, folder: Path) -> Params:
    network = make_text_encoder(config.model.text_encoder)
    return load_text_encoder(
        open_model(str(folder), components=["text_encoder"]), network.abstract()
    )


def held_out_pictures(num_images: int) -> tuple[np.ndarray, list[str]]:
    source = ShapesSource(num_images, 64, "validation")
    examples = [source[i] for i in range(num_images)]
    return np.stack([e.pixels for e in examples]), [e.captions[0] for e in examples]


@pytest.mark.fast
def test_the_folder_is_small_and_says_what_the_yaml_says(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 3e6
    write_configs(tmp_path, config)
    write_tokenizer(tmp_path / "tokenizer", config.model.text_encoder.max_position_embeddings)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    stale = [p for p in made if (tmp_path / p).read_text() != (folder / p).read_text()]
    assert len(made) == 9
    assert not stale, (
        f"run python -m sdx.assets.make_tiny: {stale} differ from conf/model/tiny.yaml"
    )


@pytest.mark.fast
def test_caption_words_are_single_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    assert len(vocabulary) <= 1000
    assert all(word + "</w>" in vocabulary for word in caption_words())
    assert all(c in vocabulary and c + "</w>" in vocabulary for c in byte_letters().values())
    ids = tokenizer.encode(["a small red circle on a blue background"])[0]
    assert np.sum(ids != tokenizer.pad_token_id) == 9  # the start token and eight words


@pytest.mark.fast
def test_merges_are_learnt_commonest_first() -> None:
    assert learn_merges(["aab", "aac", "a"]) == [
        ("a", "a"),
        ("aa", "b</w>"),
        ("aa", "c</w>"),
    ]


def test_transformers_gives_the_same_ids_and_the_text_back(
    folder: Path, tokenizer: Tokenizer
) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    batch = theirs(TEXTS, padding="max_length", max_length=77, truncation=True)
    assert np.array_equal(tokenizer.encode(TEXTS), np.array(batch["input_ids"]))
    assert theirs.decode(batch["input_ids"][2], skip_special_tokens=True).startswith("a photo of")


def test_diffusers_decodes_and_encodes_alike(config: Config, folder: Path, vae: Params) -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    loaded: Any = AutoencoderKL.from_pretrained(
        folder / "vae", torch_dtype=torch.float32, output_loading_info=True
    )
    theirs, info = loaded
    assert not any(info.values()), info
    assert theirs.config["scaling_factor"] == config.model.vae.scaling_factor
    images = np.asarray(to_signed(jnp.asarray(held_out_pictures(2)[0])))
    network = make_vae(config.model.vae)
    moments = network.apply(vae, jnp.asarray(images), method="encode")
    latents = np.array(moments[..., :4])
    with torch.no_grad():
        reference = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = theirs.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    np.testing.assert_allclose(latents, reference.mean.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    ours = network.apply(vae, jnp.asarray(latents), method="decode")
    np.testing.assert_allclose(ours, decoded.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_transformers_encodes_text_alike(
    config: Config, folder: Path, tokenizer: Tokenizer, text_encoder: Params
) -> None:
    import torch
    from transformers import CLIPTextModel

    loaded: Any = CLIPTextModel.from_pretrained(
        folder / "text_encoder", dtype=torch.float32, output_loading_info=True
    )
    theirs, info = loaded
    assert not any(info.values()), info
    tokens = tokenizer.encode(TEXTS)
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens.astype(np.int64))).last_hidden_state.numpy()
    network = make_text_encoder(config.model.text_encoder)
    context = network.apply(text_encoder, jnp.asarray(tokens))
    np.testing.assert_allclose(context, reference, atol=1e-4)


def test_pictures_survive_the_autoencoder(config: Config, vae: Params) -> None:
    """Also with noise of a tenth on the latents, as a UNet leaves it; latents are standardised."""
    network = make_vae(config.model.vae)
    images, prompts = held_out_pictures(256)
    encode = jax.jit(lambda x: network.apply(vae, to_signed(x), method="encode"))
    decode = jax.jit(lambda x: network.apply(vae, x, method="decode"))
    mean, logvar = np.split(np.asarray(encode(images)), 2, axis=-1)
    np.testing.assert_allclose(mean.mean((0, 1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(mean.std((0, 1, 2)), 1, atol=0.1)
    assert np.exp(0.5 * logvar).mean() < 0.2
    for noise, worst_error in ((0.0, 3.0), (0.1, 6.0)):
        grain = np.random.default_rng(0).normal(0, noise, mean.shape).astype(np.float32)
        decoded = np.clip(127.5 * np.asarray(decode(mean + grain)) + 127.5, 0, 255).astype(np.uint8)
        assert np.abs(decoded.astype(np.float32) - images).mean() < worst_error
        adherence = measure_adherence(decoded, prompts)
        assert adherence.colour >= 0.99
        assert adherence.shape >= 0.99


def test_context_names_the_attributes_of_held_out_captions(
    config: Config, tokenizer: Tokenizer, text_encoder: Params
) -> None:
    """A linear read-out fitted on captions of `train` reads those of `validation` faultlessly."""
    network = make_text_encoder(config.model.text_encoder)
    encode = jax.jit(lambda tokens: network.apply(text_encoder, tokens)[:, [12, 40, 76]])
    states = {
        split: np.asarray(encode(tokenizer.encode([c.caption for c in combinations(split)])))
        for split in ("train", "validation")
    }
    for name, values in VALUES.items():
        classes = {
            split: np.array([values.index(getattr(c, name)) for c in combinations(split)])
            for split in states
        }
        wanted = np.eye(len(values))[classes["train"]]
        for place in range(3):
            readout = np.linalg.lstsq(states["train"][:, place], wanted, rcond=None)[0]
            found = np.argmax(states["validation"][:, place] @ readout, axis=-1)
            assert np.array_equal(found, classes["validation"]), name


@pytest.mark.fast
def test_shorter_captions_say_what_they_leave_out() -> None:
    rng = np.random.default_rng(0)
    drawn = [describe(combinations("train")[0], rng) for _ in range(100)]
    for caption, classes in drawn:
        for name, value in classes.items():
            is_named = value < len(VALUES[name])
            assert is_named == (is_named and VALUES[name][value] in caption)
    captions = [caption for caption, _ in drawn]
    assert "" in captions
    assert captions.count(combinations("train")[0].caption) > 50
