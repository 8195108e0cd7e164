"""A model in diffusers' layout: a folder for each component, with its config.json and weights.

Which of the files of a component are its weights is decided here, from names alone, so that a Hub
repository can be asked before anything is downloaded.
"""

import fnmatch
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdx.weights.errors import WeightsError
from sdx.weights.names import current_name
from sdx.weights.tensor_files import (
    Renamed,
    check_torch,
    open_tensors,
    read_json,
    shard_names,
)

COMPONENTS = ("unet", "vae", "text_encoder")
CONFIGS = dict.fromkeys(COMPONENTS, "config.json") | {"scheduler": "scheduler_config.json"}
# What diffusers and transformers call the weights: (safetensors, pickle), without their endings.
STEMS = {
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
    "text_encoder": ("model", "pytorch_model"),
}
ENDINGS = ("safetensors", "bin")  # the first that is there is read
# Names a component's weights may have, after the stem; indices of variants changed their order.
PLAIN = (".{ending}", ".{ending}.index.json")
OF_A_VARIANT = (
    ".{variant}.{ending}",
    ".{ending}.index.{variant}.json",
    ".{ending}.{variant}.index.json",
)
VARIANT = re.compile(
    r"\w+\.(?:(?P<one>\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)|\w+\.index\.(?P<many>\w+)\.json)"
)
# Pipelines whose parts look like ours and are not: (part of the class in model_index.json, what).
OTHER_PIPELINES = (
    ("XL", "Stable Diffusion XL"),
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("Flux", "Flux"),
    ("Inpaint", "an inpainting model"),
    ("Depth2Img", "a depth-to-image model"),
    ("Upscale", "an upscaler"),
    ("InstructPix2Pix", "an image-editing model"),
    ("UnCLIP", "Stable unCLIP"),
)
# What a folder without the parts of a model may be: (pattern of a file in it, what to do).
OTHER_FOLDERS = (
    ("config.yaml", "this is an sdx run: give its export/ folder, or fork it with run.resume_from"),
    ("pytorch_lora_weights.*", "this is a LoRA adapter: give the model it was made for"),
    ("diffusion_pytorch_model*", "this is one network alone: use model.unet_checkpoint for a UNet"),
    ("unet_ema", "this is a checkpoint of diffusers' trainer: model.unet_checkpoint=.../unet_ema"),
    ("transformer", "its network is a transformer (Stable Diffusion 3, Flux): sdx trains UNets"),
    (
        "*.safetensors",
        "an original single file is given by its own path (from the Hub: after `hf download`)",
    ),
    ("*.ckpt", "a .ckpt is a pickle: convert it to .safetensors first"),
)
SMALL_FILE_BYTES = 10 << 20


@dataclass(frozen=True)
class DiffusersFolder:
    """The files of one folder, wherever it came from; made by `open_folder`."""

    source: str
    folder: Path
    weights: dict[str, str]
    """File of each component that may be read, relative to the folder."""
    commit: str | None = None
    """Of the Hub's repository."""

    def config(self, component: str) -> dict[str, Any]:
        """The JSON beside the component's weights."""
        path = self._config_path(component)
        if component == "scheduler" and not path.is_file():
            raise WeightsError(
                f"{path}: missing; without it nobody knows what the UNet was trained to output. "
                "Take it from the model this one was made from."
            )
        return read_json(path)

    def where(self, component: str) -> str:
        """The path of that JSON."""
        return str(self._config_path(component))

    @contextmanager
    def tensors(self, component: str) -> Iterator[Renamed]:
        """The component's tensors under today's names."""
        with open_tensors(self.folder / self.weights[component]) as found:
            names = {
                current: name
                for name in found.shapes()
                if (current := current_name(component, name)) is not None
            }
            yield Renamed(found, names)

    def tokenizer_folder(self) -> Path:
        """Vocabulary and merges."""
        return self.folder / "tokenizer"

    def provenance(self) -> dict[str, Any]:
        """Source, commit, and SHA-256 of every file of a Hub repository that is read."""
        files = {} if self.commit is None else {name: self._digest(name) for name in self._files()}
        return {"source": self.source, "commit": self.commit, "files": files}

    def _config_path(self, component: str) -> Path:
        return self.folder / component / CONFIGS[component]

    def _files(self) -> list[str]:
        names = [f"{component}/{CONFIGS[component]}" for component in (*self.weights, "scheduler")]
        names += [f"tokenizer/{path.name}" for path in self.tokenizer_folder().glob("*")]
        for weights in self.weights.values():
            names += with_shards(self.folder, weights)
        return sorted(name for name in names if (self.folder / name).is_file())

    def _digest(self, name: str) -> str | None:
        """The Hub's cache names large files by their digest; None for a large file elsewhere."""
        path = (self.folder / name).resolve()
        if re.fullmatch(r"[0-9a-f]{64}", path.name):
            return path.name
        if path.stat().st_size > SMALL_FILE_BYTES:
            return None
        return hashlib.sha256(path.read_bytes()).hexdigest()


def open_folder(
    source: str,
    folder: Path,
    *,
    variant: str | None = None,
    components: Iterable[str] = COMPONENTS,
    say: Callable[[str], None] = print,
) -> DiffusersFolder:
    """The model in `folder`, to read `components` of; raises as `check_weights` does."""
    there = list_files(folder)
    weights = check_weights(source, folder, there, components, variant, say=say)
    return DiffusersFolder(source, folder, weights)


def check_weights(
    source: str,
    folder: Path,
    there: Collection[str],
    components: Iterable[str],
    variant: str | None,
    *,
    say: Callable[[str], None],
) -> dict[str, str]:
    """The file (or index) of each component's weights, of the files that are `there`.

    Says which components lack the variant. Raises one WeightsError for all that is missing, and for
    models of another kind. `folder` need not hold any weights yet.
    """
    _check_pipeline(folder)
    weights = choose_weights(there, components, variant)
    faults = [fault for component in weights for fault in absences(component, weights, there)]
    if faults:
        top = {path.name for path in folder.glob("*")} | {name.split("/")[0] for name in there}
        hints = [hint for pattern, hint in OTHER_FOLDERS if fnmatch.filter(top, pattern)]
        raise WeightsError(f"{source}: not a whole model in diffusers' layout:", faults, hints[:1])
    chosen = {component: str(name) for component, name in weights.items()}
    if variant is not None:
        _tell_variant(source, there, chosen, variant, say)
    for name in chosen.values():
        if ".bin" in name:
            check_torch(folder / name)
    return chosen


def choose_weights(
    there: Collection[str], components: Iterable[str], variant: str | None
) -> dict[str, str | None]:
    """The file (or index) of each component's weights: the variant's, or else the plain one."""
    names = {
        component: [*_names(component, OF_A_VARIANT, variant), *_names(component, PLAIN)]
        for component in components
    }
    return {
        component: next((name for name in candidates if name in there), None)
        for component, candidates in names.items()
    }


def absences(
    component: str, weights: dict[str, str | None], there: Collection[str]
) -> Iterator[str]:
    """What a component lacks, and what it has instead."""
    names = [name.split("/")[1] for name in sorted(there) if name.startswith(f"{component}/")]
    if not names:
        yield f"{component}/ is missing"
        return
    if "config.json" not in names:
        yield f"{component}/config.json is missing"
    if weights[component] is None:
        needs = f"{component}/{STEMS[component][0]}.safetensors is missing"
        others = [name for name in names if name != "config.json"]
        variants = {
            v for n in names if (m := VARIANT.fullmatch(n)) and (v := m["one"] or m["many"])
        }
        if variants:
            yield f"{needs}; found only model.variant={' or '.join(sorted(variants))}"
        elif any(name.endswith(".msgpack") for name in others):
            yield f"{needs}; Flax's .msgpack is not read: save the model with PyTorch"
        else:
            yield f"{needs}; found {', '.join(others) or 'no weights'} there"


def list_files(folder: Path) -> set[str]:
    """Paths of all files in the components' folders, relative to `folder`."""
    return {
        f"{component}/{path.name}"
        for component in CONFIGS
        for path in (folder / component).glob("*")
        if path.is_file()
    }


def with_shards(folder: Path, weights: str) -> list[str]:
    """The file itself and, of an index, all files it names."""
    if not weights.endswith(".json"):
        return [weights]
    component = weights.split("/")[0]
    shards = dict.fromkeys(shard_names(folder / weights).values())
    return [weights, *(f"{component}/{shard}" for shard in shards)]


def _names(component: str, patterns: tuple[str, ...], variant: str | None = None) -> list[str]:
    """Paths the weights of a component may have; none of no variant."""
    if patterns is OF_A_VARIANT and variant is None:
        return []
    return [
        f"{component}/{stem}{pattern.format(ending=ending, variant=variant)}"
        for stem, ending in zip(STEMS[component], ENDINGS, strict=True)
        for pattern in patterns
    ]


def _check_pipeline(folder: Path) -> None:
    path = folder / "model_index.json"
    if not path.is_file():
        return
    kind = str(read_json(path).get("_class_name"))
    for part, what in OTHER_PIPELINES:
        if part in kind:
            raise WeightsError(
                f"{path}: _class_name={kind} is {what}; sdx trains Stable Diffusion 1.x and 2.x "
                "for text to image."
            )


def _tell_variant(
    source: str,
    there: Collection[str],
    chosen: dict[str, str],
    variant: str,
    say: Callable[[str], None],
) -> None:
    if not any(
        name in there
        for component in COMPONENTS
        for name in _names(component, OF_A_VARIANT, variant)
    ):
        found = ", ".join(sorted(name for name in there if "config.json" not in name))
        raise WeightsError(
            f"model.variant={variant}: {source} has no such files; it has {found}. Use null, or "
            "the word before .safetensors in one of these names."
        )
    for component, name in chosen.items():
        if name in _names(component, PLAIN):
            say(f"{source}: {component} has no variant {variant}; reading {name}")
