"""A whole model, or a UNet alone, in one .safetensors file without configs.

Whole models are in the original layout of 1.x and 2.x (original_names.py); a UNet may be in
diffusers' spelling too. Such a file does not say what it is: shapes tell most of the architecture
(shapes.py), a `model` the rest, metadata or a .yaml what it was trained for (original_training.py).
The tokenizer is CLIP's, which ships with sdx.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from sdx.config.compose import compose
from sdx.config.leaves import plain
from sdx.config.schema import ModelConfig
from sdx.record.store import AnyPath
from sdx.weights.errors import WeightsError
from sdx.weights.original_names import IGNORED, OPEN_CLIP, PREFIXES, Place, component_of, places
from sdx.weights.original_training import METADATA_KEY, read_training
from sdx.weights.shapes import told_by_shapes
from sdx.weights.tensor_files import Tensors, open_tensors

# Files that are something else: (regular expression on names, what it is).
REFUSED = (
    (r"^conditioner\.embedders\.1\.", "Stable Diffusion XL"),
    (r"^model\.diffusion_model\.label_emb\.", "Stable Diffusion XL, an upscaler or unCLIP"),
    (r"(^|\.)(joint|double)_blocks\.", "Stable Diffusion 3 or Flux"),
    (r"^control_model\.", "a ControlNet"),
    (r"(^|[._])lora_", "a LoRA adapter; give the model it was made for"),
)
INLETS = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight")
IN_CHANNELS = {5: "a depth-to-image model", 8: "an image-editing model", 9: "an inpainting model"}
DIFFUSERS_UNET = re.compile(
    r"^(conv_in|time_embedding|(down|up)_blocks|mid_block|conv_norm_out|conv_out)\."
)
# Arrays of a whole file beside its components: the noise schedule, and what training counted.
BUFFERS = (
    r"^(sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?$",
    r"^(betas|posterior_\w+|lvlb_weights|logvar|scale_factor|global_step)$",
    r"^denoiser\.",
)
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
SINGLE_FILES = {".safetensors", *PICKLES}
# Options of conf/model that a whole file may be, by the width of its text states and what the UNet
# was trained to output (None: nothing tells).
GUESSES: dict[int, dict[str | None, str]] = {
    768: {None: "sd15", "epsilon": "sd15", "v_prediction": "sd15"},
    1024: {"epsilon": "sd21_base", "v_prediction": "sd21"},
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class OriginalTensors:
    """One component's tensors in a single file, under today's names."""

    tensors: Tensors
    places: dict[str, Place]

    @property
    def path(self) -> AnyPath:
        """The file."""
        return self.tensors.path

    def shapes(self) -> Shapes:
        """Every tensor's shape."""
        return _shapes(self.places, self.tensors.shapes())

    def read(self, name: str) -> np.ndarray:
        """One tensor; of a fused array its own rows."""
        place = self.places[name]
        array = self.tensors.read(place.name)
        part = array if place.third is None else np.split(array, 3)[place.third]
        return part.reshape(_shape(place, array.shape))


@dataclass(frozen=True)
class SingleFile:
    """One .safetensors file; what it does not tell of its architecture is `model`'s."""

    source: str
    path: Path
    model: ModelConfig
    places: dict[str, dict[str, Place]]
    """Of each component in it."""
    told: dict[str, dict[str, Any]]
    """Keys of each component's config, and of "scheduler"'s, that files decide."""
    told_by: Path
    """The file that tells the prediction type."""

    def config(self, component: str) -> dict[str, Any] | None:
        """What its config.json or scheduler_config.json would say; None where nothing tells."""
        if component == "scheduler" or component not in self.places:
            return self.told.get(component)
        ours = vars(getattr(self.model, component))
        return {key: plain(value) for key, value in ours.items()} | self.told[component]

    def where(self, component: str) -> str:
        """The file, or the .yaml beside it."""
        return str(self.told_by if component == "scheduler" else self.path)

    @contextmanager
    def tensors(self, component: str) -> Iterator[OriginalTensors]:
        """The component's tensors."""
        with open_tensors(self.path) as tensors:
            yield OriginalTensors(tensors, self.places[component])

    def tokenizer_folder(self) -> Path:
        """CLIP's own tokenizer, with the padding of 1.x or 2.x."""
        text = self.places["text_encoder"].values()
        kind = "sd2" if any(OPEN_CLIP.match(place.name) for place in text) else "sd1"
        return Path(str(files("sdx"))) / "assets" / "clip" / kind

    def provenance(self) -> dict[str, Any]:
        """Where it lies; local files are not digested."""
        return {"source": self.source, "commit": None, "files": {}}


def open_original(
    source: str,
    path: Path,
    model: ModelConfig | None,
    *,
    components: Iterable[str] = tuple(PREFIXES),
    say: Callable[[str], None] = print,
) -> SingleFile:
    """The model in `path`, to read `components` of; without a `model` one of Stability's own.

    Says which arrays are not read. Raises WeightsError for any other kind of file, with what it is,
    and where nothing tells what the UNet outputs.
    """
    shapes, metadata = _read_header(path)
    _refuse_others(path, shapes)
    found = {part: places(part, shapes) for part in PREFIXES}
    if missing := [PREFIXES[part][0] for part in components if not found[part]]:
        fix = "give the file it was cut from"
        if found["unet"] or any(map(DIFFUSERS_UNET.match, shapes)):
            fix += ", or a whole model, and this as model.unet_checkpoint"
        raise WeightsError(f"{path}: no whole model, no {'* and no '.join(missing)}* in it; {fix}.")
    training = read_training(path, metadata)
    told = {part: told_by_shapes(part, _shapes(found[part], shapes)) for part in found}
    if model is None:
        model = _guess(path, told["unet"].get("cross_attention_dim"), training.prediction_type)
    is_open_clip = any(map(OPEN_CLIP.match, shapes))
    told["text_encoder"]["hidden_act"] = "gelu" if is_open_clip else "quick_gelu"
    told["vae"] |= training.vae
    trained = training.prediction_type or model.prediction_type.name
    told["scheduler"] = training.scheduler | {"prediction_type": trained}
    _tell_unread(path, shapes, say)
    return SingleFile(source, path, model, found, told, training.path)


def open_unet_file(source: str, path: Path, model: ModelConfig) -> SingleFile:
    """The UNet in `path`, alone or with the rest of a model, in either spelling."""
    shapes, metadata = _read_header(path)
    _refuse_others(path, shapes)
    found = places("unet", shapes)
    if not found and any(map(DIFFUSERS_UNET.match, shapes)):
        found = {name: Place(name) for name in shapes}
    if not found:
        raise WeightsError(
            f"{path}: no UNet in it, neither {PREFIXES['unet'][0]}* nor diffusers' names; give a "
            "UNet's .safetensors file."
        )
    training = read_training(path, metadata)
    told = {"unet": told_by_shapes("unet", _shapes(found, shapes))}
    if training.prediction_type is not None:
        told["scheduler"] = training.scheduler | {"prediction_type": training.prediction_type}
    return SingleFile(source, path, model, {"unet": found}, told, training.path)


def _read_header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes of all arrays, and the metadata."""
    if path.suffix in PICKLES:
        raise WeightsError(
            f"{path}: a pickle, which may run any code, is not opened; save its tensors as "
            ".safetensors (torch.load(..., weights_only=True), safetensors.torch.save_file)."
        )
    with open_tensors(path) as tensors, safe_open(path, "numpy") as file:
        return tensors.shapes(), file.metadata() or {}


def _refuse_others(path: Path, shapes: Shapes) -> None:
    kinds = [what for pattern, what in REFUSED if any(re.search(pattern, name) for name in shapes)]
    channels = [dims[1] for inlet in INLETS if len(dims := shapes.get(inlet, ())) > 1]
    kinds += [
        f"{IN_CHANNELS[count]}, by the {count} input channels of its UNet"
        for count in channels
        if count in IN_CHANNELS
    ]
    if kinds:
        raise WeightsError(
            f"{path}: {kinds[0]}; sdx trains text-to-image models of Stable Diffusion 1.x and 2.x."
        )


def _guess(path: Path, width: int | None, trained: str | None) -> ModelConfig:
    """Which of Stability's models a file is."""
    names = GUESSES.get(width or 0)
    if names is None:
        raise WeightsError(
            f"{path}: text states of width {width} are neither 1.x's (768) nor 2.x's (1024); "
            "name the option of conf/model that it is: model=NAME or --model NAME (in training "
            "with model.from_files=false)."
        )
    if trained not in names:
        raise WeightsError(
            f"{path}: nothing tells what its UNet outputs, neither its metadata ({METADATA_KEY}) "
            f"nor {path.with_suffix('.yaml').name} beside it; give model=sd21 if that is "
            "v_prediction (768 pixels), model=sd21_base if it is epsilon (512 pixels); in training "
            "with model.from_files=false."
        )
    return compose([f"model={names[trained]}"]).model


def _tell_unread(path: Path, shapes: Shapes, say: Callable[[str], None]) -> None:
    """One line about arrays that nothing here reads; averaged weights are the usual ones."""
    others = [
        name.split(".")[0]
        for name in shapes
        if component_of(name) is None
        and not any(re.search(pattern, name) for pattern in (*IGNORED, *BUFFERS))
    ]
    if others:
        counted = (f"{others.count(start)} of {start}.*" for start in sorted(set(others)))
        choice = "; the plain weights are read, as diffusers does" * ("model_ema" in others)
        say(f"{path}: arrays that are not read: {', '.join(counted)}{choice}")


def _shapes(places: dict[str, Place], shapes: Shapes) -> Shapes:
    return {name: _shape(place, shapes[place.name]) for name, place in places.items()}


def _shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape today of what lies at `place` with `shape`."""
    if place.third is not None:
        return (shape[0] // 3, *shape[1:])
    return shape[:2] if place.is_linear else shape
