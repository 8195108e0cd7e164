"""`sdx.load` and `Pipeline`: a model as a handful of functions, for notebooks and every command.

Arrays are NHWC and float32; images lie in [-1, 1].
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32, UInt32

from sdx.config import resolve
from sdx.config.check import check
from sdx.config.compose import compose, from_saved
from sdx.config.folders import CONF, group_options
from sdx.config.schema import (
    HUB_ID,
    AttentionConfig,
    DiffusionConfig,
    ModelConfig,
    Platform,
    SamplerKind,
)
from sdx.data.tokenizer import Tokenizer, load_tokenizer
from sdx.diffusion.schedule import make_schedule
from sdx.models.attention_choice import select_attention
from sdx.models.networks import Networks, make_networks
from sdx.parallel import sharding
from sdx.parallel.mesh import one_device_mesh
from sdx.parallel.whole import place_whole, to_host
from sdx.record.files import read_json
from sdx.record.paths import RunPaths
from sdx.record.provenance import weights_commit
from sdx.record.store import AnyPath, ObjectPath, as_path
from sdx.sampling.denoise import DenoiseRule, denoise, initial_latents, picture_keys
from sdx.training.checkpoint import restore_params
from sdx.weights.configs import check_model, read_model
from sdx.weights.errors import WeightsError
from sdx.weights.export import SpecialTokens, save_model
from sdx.weights.export_folder import export_folder
from sdx.weights.folder import COMPONENTS
from sdx.weights.load import LOADERS
from sdx.weights.model_files import EMBEDDED, ModelFiles, open_model
from sdx.weights.scheduler import read_scheduler, scheduler_config

BATCH_SIZE = 8  # prompts drawn at once, so that any number of them compiles one program

Params = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Functions:
    """The compiled functions of one architecture; shared by all weights it is given."""

    encode_text: Callable[..., Array]
    encode_images: Callable[..., Array]
    decode_latents: Callable[..., Array]
    predict: Callable[..., Array]
    rule: DenoiseRule


@dataclass(frozen=True, eq=False, repr=False)
class Pipeline:
    """UNet, autoencoder, text encoder and tokenizer, ready to draw. Made by `sdx.load`."""

    params: Params
    """`unet`, `vae` and `text_encoder`."""
    functions: Functions
    tokenizer: Tokenizer
    mesh: Mesh
    scaling_factor: float
    latent_shape: tuple[int, int, int]
    """Height, width and channels of what is drawn."""
    model: ModelConfig
    diffusion: DiffusionConfig
    tokenizer_folder: Path
    batch_size: int = BATCH_SIZE

    def __repr__(self) -> str:
        side, *_ = self.latent_shape
        pixels = side * self.model.vae.factor
        rule = self.functions.rule
        return (
            f"Pipeline({self.model.name}: {pixels} x {pixels} pixels, {rule.prediction_type.name}, "
            f"sampler {rule.kind.name})"
        )

    def with_params(self, params: Params) -> "Pipeline":
        """This pipeline with other weights for the networks named; nothing is compiled again."""
        return replace(self, params=self.params | params)

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "b s"]:
        """Token ids, padded or cut to the text encoder's length."""
        return self.tokenizer.encode(_listed("texts", texts))

    def encode_text(self, tokens: Int[Array | np.ndarray, "b s"]) -> Float[Array, "b s d"]:
        """Text states (`context`), after the final LayerNorm."""
        length = self.model.text_encoder.max_position_embeddings
        _check_shape("tokens", tokens, ("b", length), "pipe.tokenize makes them")
        return self.functions.encode_text(self.params["text_encoder"], self._place(tokens))

    def encode_images(
        self, images: Float[Array | np.ndarray, "b H W c"]
    ) -> Float[Array, "b h w m"]:
        """Moments of the latents: mean and log-variance, not scaled."""
        _check_shape("images", images, ("b", "H", "W", self.model.vae.in_channels), "NHWC")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images: are {images.dtype}, must be floats in [-1, 1].")
        return self.functions.encode_images(self.params["vae"], self._place(images))

    def decode_latents(
        self, latents: Float[Array | np.ndarray, "b h w c"]
    ) -> Float[Array, "b H W o"]:
        """Images, not clipped; `latents` are not divided by the scaling factor here."""
        _check_shape("latents", latents, ("b", "h", "w", self.latent_shape[-1]), "NHWC")
        return self.functions.decode_latents(self.params["vae"], self._place(latents))

    def predict(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        timesteps: Int[Array | np.ndarray, " b"],
        context: Float[Array | np.ndarray, "b s d"],
    ) -> Float[Array, "b h w c"]:
        """The UNet's raw output for noisy latents."""
        _check_shape("latents", latents, ("b", "h", "w", self.latent_shape[-1]), "NHWC")
        _check_shape("timesteps", timesteps, (len(latents),), "one for each of the latents")
        width = self.model.unet.cross_attention_dim
        _check_shape("context", context, (len(latents), "s", width), "pipe.encode_text makes it")
        inputs = (self._place(x) for x in (latents, timesteps, context))
        return self.functions.predict(self.params["unet"], *inputs)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        num_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        latents: Float[np.ndarray, "b h w c"] | None = None,
        keys: UInt32[np.ndarray, "b k"] | None = None,
        seed: int = 0,
        output: Literal["images", "latents"] = "images",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Float[np.ndarray, "b H W c"]:
        """One picture for each prompt, clipped to [-1, 1], or its latents (divided by the scaling
        factor).

        `negative_prompts` is one for all, or one for each; default empty. Picture i of a seed is
        the same whatever the other prompts. `sampler` is ddpm, ddim, pndm, euler or dpmpp_2m, by
        default the model's own. `latents` replaces the noise that `seed` gives to start from,
        `keys` what ddpm draws more with. Raises SamplerError for what the sampler cannot do,
        SamplingStopped soon after `should_stop` says so.
        """
        if not _listed("prompts", prompts):
            raise ValueError("prompts: none given; give at least one (it may be empty).")
        _check_choices(sampler, output, guidance_scale, guidance_rescale)
        rule = self.functions.rule
        if sampler is not None:
            rule = replace(rule, kind=SamplerKind[sampler])
        negatives = _listed("negative_prompts", negative_prompts or [""])
        negatives = _one_for_each(negatives, len(prompts))
        keys = picture_keys(seed, len(prompts)) if keys is None else keys
        if latents is None:
            latents = initial_latents(seed, (len(prompts), *self.latent_shape))
        _check_latents(np.shape(latents), (len(prompts), *self.latent_shape))
        draw = partial(
            denoise,
            rule,
            self.params["unet"],
            num_steps=num_steps,
            guidance_scale=float(guidance_scale),
            guidance_rescale=float(guidance_rescale),
            should_stop=should_stop,
        )
        size = min(self.batch_size, len(prompts))
        drawn = []
        for start in range(0, len(prompts), size):
            rows = [min(row, len(prompts) - 1) for row in range(start, start + size)]
            context, negative_context = (
                self.encode_text(self.tokenize([texts[row] for row in rows]))
                for texts in (prompts, negatives)
            )
            noise = self._place(np.asarray(latents)[rows])
            clean = draw(noise, self._place(keys[rows]), context, negative_context)
            clean = to_host(clean) / self.scaling_factor
            if output == "images":
                clean = np.clip(np.asarray(self.decode_latents(clean)), -1, 1)
            drawn.append(clean)
        return np.concatenate(drawn)[: len(prompts)].astype(np.float32)

    def save(self, folder: str | AnyPath, *, dtype: str = "float32") -> None:
        """Writes diffusers' layout, for `StableDiffusionPipeline.from_pretrained(folder)`.

        `folder` must be missing, empty, or hold what was saved of the same model before; it is
        replaced once all is written. `dtype` is how the weights are stored: float32, float16 or
        bfloat16. Raises ExportError with the reason.
        """
        with export_folder(as_path(folder), {"of": self.model.name}) as draft:
            self.write_files(draft, dtype=dtype)

    def write_files(self, folder: Path, *, dtype: str = "float32") -> None:
        """The files of `save`, put into a folder that is there and empty."""
        side, *_ = self.latent_shape
        drawn = replace(
            self.model,
            resolution=side * self.model.vae.factor,
            unet=replace(self.model.unet, sample_size=side),
        )
        bos, eos = self.tokenizer.encode([""])[0, :2].tolist()
        rule = self.functions.rule
        save_model(
            folder,
            self.params,
            drawn,
            scheduler=scheduler_config(self.diffusion, rule.prediction_type, rule.kind),
            tokenizer=self.tokenizer_folder,
            tokens=SpecialTokens(bos=bos, eos=eos, pad=self.tokenizer.pad_token_id),
            dtype=dtype,
        )

    def _place(self, x: Array | np.ndarray) -> Array:
        """On the mesh, split over its devices where the number of rows allows."""
        divides = len(x) % sharding.batch_divisor(self.mesh) == 0
        place = sharding.batch_sharding(self.mesh) if divides else sharding.replicated(self.mesh)
        return place_whole(x, place)


def load(
    source: str | AnyPath,
    revision: str | None = None,
    dtype: str = "float32",
    *,
    variant: str | None = None,
    model: str | None = None,
    mesh: Mesh | None = None,
) -> Pipeline:
    """The model in a diffusers-layout folder, an original file, a Hub id or an sdx run folder.

    A run folder gives its newest checkpoint, averaged weights where it keeps them. `revision` is a
    branch, tag or commit on the Hub, `variant` one of the weight files, such as fp16. `dtype` is
    what is computed in: float32 or bfloat16. `model` is the option of conf/model that an original
    .safetensors file is, where the file does not tell; `mesh` is what it lies on, by default one
    device. Raises WeightsError, ConfigError or NoValidCheckpoint with the reason.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: use float32 or bfloat16.")
    path = as_path(source)
    if model is not None and path.suffix != ".safetensors":
        raise WeightsError(
            f"model={model}: only an original .safetensors file needs it, {source} says itself "
            "what it is; leave it out."
        )
    if (path / "config.yaml").is_file():
        return load_run(path, dtype=dtype, mesh=mesh)[1]
    if isinstance(path, ObjectPath):
        raise WeightsError(f"{source}: no sdx run; model folders and files are read locally.")
    if not path.exists() and not re.fullmatch(HUB_ID, str(source)):
        raise WeightsError(
            f"{source}: no sdx run, no folder in diffusers' layout, no original .safetensors file "
            f"and no Hub id (OWNER/NAME) of that name; {_meant(str(source))}."
        )
    named = None if model is None else compose([f"model={model}"]).model
    files = open_model(str(source), revision=revision, variant=variant, model=named)
    if named is not None:
        check_model(files, named, COMPONENTS)
    diffusion, sampler = read_scheduler(files.config("scheduler") or {}, files.where("scheduler"))
    found = read_model(files)
    _check_numbers(str(source), found, diffusion)
    mesh = mesh or one_device_mesh()
    networks = _networks(found, dtype, mesh)
    return _assemble(files, networks, {}, mesh, found, diffusion, sampler, found.resolution)


def _meant(source: str) -> str:
    """What a name that is none of a model's may stand for."""
    if source == EMBEDDED:
        return "the embedded model has no UNet before it is trained: give the run of it"
    if source in group_options([CONF])["model"]:
        return f"model={source} is {compose([f'model={source}']).model.pretrained}"
    return "check the path"


def _check_numbers(source: str, model: ModelConfig, diffusion: DiffusionConfig) -> None:
    """Raises a WeightsError for numbers no network can have: heads that divide nothing, say."""
    config = replace(compose([]), model=model, diffusion=diffusion)
    rules = check(config)
    faults = [str(rule) for rule in rules if rule.path.startswith(("model.", "diffusion."))]
    if faults:
        raise WeightsError(f"{source}: {len(faults)} numbers in its configs cannot be:", faults)


def make_pipeline(
    networks: Networks,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    sampler: SamplerKind,
    tokenizer_folder: Path,
    resolution: int,
    batch_size: int = BATCH_SIZE,
) -> Pipeline:
    """A pipeline of parts that are there already, as in training; `resolution` in pixels."""
    functions = _compile(networks, mesh, model, diffusion, sampler)
    side = resolution // model.vae.factor
    return Pipeline(
        params=params,
        functions=functions,
        tokenizer=tokenizer,
        mesh=mesh,
        scaling_factor=model.vae.scaling_factor,
        latent_shape=(side, side, model.vae.latent_channels),
        model=model,
        diffusion=diffusion,
        tokenizer_folder=tokenizer_folder,
        batch_size=batch_size,
    )


def load_run(
    run: AnyPath,
    *,
    dtype: str = "float32",
    which: Literal["ema", "params"] | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[int, Pipeline]:
    """The step and the model of a run's checkpoint: that of `step`, or the newest.

    `which` None gives the averaged weights where the run keeps them. Raises as `load` does, and
    CheckpointMismatch for averages that were never kept.
    """
    config = from_saved(run)
    mesh = mesh or one_device_mesh()
    masked = config.attention.mask_padding_tokens
    networks = _networks(config.model, dtype, mesh, mask_padding_tokens=masked)
    which = which or ("ema" if config.train.ema else "params")
    found, restored = restore_params(RunPaths(run).checkpoints, which, step=step, say=print)
    abstract = _abstract(networks, mesh)
    trained = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding),
        restored,
        {name: abstract[name] for name in restored},
    )
    diffusion = replace(config.diffusion, prediction_type=resolve.prediction_type(config))
    files = open_model(
        config.model.pretrained,
        revision=config.model.revision or _recorded_commit(run, config.model),
        variant=config.model.variant,
        components=[name for name in LOADERS if name not in trained],
        model=config.model,
    )
    side = resolve.resolution(config)
    sampler = resolve.sampler_kind(config)
    return found, _assemble(files, networks, trained, mesh, config.model, diffusion, sampler, side)


def _recorded_commit(run: AnyPath, model: ModelConfig) -> str | None:
    return weights_commit(read_json(RunPaths(run).run), model.pretrained)


def _assemble(
    files: ModelFiles,
    networks: Networks,
    trained: Params,
    mesh: Mesh,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    sampler: SamplerKind,
    resolution: int,
) -> Pipeline:
    """The pipeline of the trained networks' weights and, for the others, those in `files`."""
    wanted = _abstract(networks, mesh).items()
    loaded = {name: LOADERS[name](files, like) for name, like in wanted if name not in trained}
    params = trained | loaded
    tokenizer = load_tokenizer(
        files.tokenizer_folder(),
        max_length=model.text_encoder.max_position_embeddings,
        num_embeddings=model.text_encoder.vocab_size,
    )
    return make_pipeline(
        networks,
        params,
        tokenizer,
        mesh,
        model=model,
        diffusion=diffusion,
        sampler=sampler,
        tokenizer_folder=files.tokenizer_folder(),
        resolution=resolution,
    )


def _networks(
    model: ModelConfig, dtype: str, mesh: Mesh, *, mask_padding_tokens: bool = False
) -> Networks:
    platform = Platform[jax.devices()[0].platform]
    return make_networks(
        model,
        attention=select_attention(AttentionConfig(), platform, dtype=dtype, mesh=mesh),
        dtype=dtype,
        mask_padding_tokens=mask_padding_tokens,
    )


def _abstract(networks: Networks, mesh: Mesh) -> Params:
    """Shapes of all parameters, and that they lie whole on each of the mesh's devices."""
    shapes = {
        "unet": networks.unet.abstract(),
        "vae": networks.vae.abstract(),
        "text_encoder": networks.text_encoder.abstract(),
    }
    place = sharding.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )


def _compile(
    networks: Networks,
    mesh: Mesh,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    sampler: SamplerKind,
) -> Functions:
    def whole(function: Callable[..., Array]) -> Callable[..., Array]:
        """Jitted, with a float32 result that every host has."""
        return jax.jit(
            lambda *args: function(*args).astype(jnp.float32),
            out_shardings=sharding.replicated(mesh),
        )

    return Functions(
        encode_text=whole(networks.text_encoder.apply),
        encode_images=whole(partial(networks.vae.apply, method="encode")),
        decode_latents=whole(partial(networks.vae.apply, method="decode")),
        predict=whole(networks.unet.apply),
        rule=DenoiseRule(
            predict=networks.unet.apply,
            schedule=make_schedule(diffusion),
            prediction_type=diffusion.prediction_type or model.prediction_type,
            spacing=diffusion.timestep_spacing,
            kind=sampler,
        ),
    )


def _listed(name: str, texts: Sequence[str]) -> Sequence[str]:
    """`texts`; a single one would be read letter by letter."""
    if isinstance(texts, str):
        raise ValueError(f"{name}: is one text, must be a list; write [{texts!r}].")
    return texts


def _check_shape(name: str, array: Any, wanted: tuple[str | int, ...], hint: str) -> None:
    """Raises ValueError unless `array` has that shape; a letter stands for any size."""
    got = getattr(array, "shape", None)
    if got is not None and len(got) == len(wanted):
        if all(isinstance(size, str) or size == n for size, n in zip(wanted, got, strict=True)):
            return
    found = f"is a {type(array).__name__}" if got is None else f"has the shape {tuple(got)}"
    shape = ", ".join(map(str, wanted)) + "," * (len(wanted) == 1)
    raise ValueError(f"{name}: {found}, must be an array ({shape}); {hint}.")


def _check_choices(
    sampler: str | None, output: str, guidance_scale: float, guidance_rescale: float
) -> None:
    if sampler is not None and sampler not in SamplerKind.__members__:
        raise ValueError(f"sampler={sampler}: use {', '.join(SamplerKind.__members__)}.")
    if output not in ("images", "latents"):
        raise ValueError(f"output={output!r}: use images or latents.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale}: must be a finite number.")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale={guidance_rescale}: must lie between 0 and 1.")


def _check_latents(got: tuple[int, ...], usual: tuple[int, ...]) -> None:
    if len(got) != 4 or (got[0], got[-1]) != (usual[0], usual[-1]):
        raise ValueError(
            f"latents: are {got}, must be (prompts, height, width, channels), usually {usual}."
        )


def _one_for_each(texts: Sequence[str], count: int) -> Sequence[str]:
    if len(texts) not in (1, count):
        allowed = " or ".join(dict.fromkeys(["1", str(count)]))
        raise ValueError(f"negative_prompts: {len(texts)} for {count} prompts; give {allowed}.")
    return texts if len(texts) == count else [texts[0]] * count
