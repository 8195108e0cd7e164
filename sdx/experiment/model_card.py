"""The README.md of an export: what the model is, how to load it, how it was trained.

Written to be published: of keys that say where something lies on this machine only the last part of
the path is shown; hosts, command lines and the environment are left out.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdx.config import resolve
from sdx.config.check import has_effect
from sdx.config.leaves import leaves, plain, spelled, value
from sdx.config.schema import HUB_ID, Config, Init
from sdx.record.store import AnyPath

GRID = "samples.png"
EXAMPLE_PROMPT = "a photograph of a lighthouse at dusk"
MEAN_OVER = 50  # last rows of metrics whose loss is averaged
# Licences of the models that sdx names as defaults, by a part of their repositories' names.
LICENSES = {
    "stable-diffusion-2": "openrail++",
    "stable-diffusion-v1": "creativeml-openrail-m",
}
# Said elsewhere in the card or in the files, or nothing to do with the weights.
_NOT_LISTED = re.compile(
    r"model\.(unet|vae|text_encoder|name|pretrained|unet_checkpoint|resolution|prediction_type)\b"
    r"|diffusion\.prediction_type|run\.(?!seed\b)|train\.global_batch_size\b|schema_version"
)
_PACKAGES = ("sdx", "jax", "flax", "optax")


@dataclass(frozen=True)
class Trained:
    """A run as far as its model's card tells of it: the checkpoint of `step`."""

    config: Config
    record: Mapping[str, Any]
    """run.json."""
    rows: Sequence[Mapping[str, Any]]
    """metrics.jsonl up to the step."""
    step: int
    is_average: bool
    grid: AnyPath | None
    """Pictures drawn with these weights."""
    adherence: Mapping[str, float] | None = None


def model_card(
    title: str, address: str, source: str, *, dtype: str, trained: Trained | None = None
) -> str:
    """The card of a run's model, or of the untrained one that `source` names, stored in `dtype`.

    `address` is what diffusers loads it by: the Hub id it goes to, or its folder's name.
    """
    base = trained.config.model.pretrained if trained else source
    parts = [_head(base), f"# {title}"]
    if trained is None:
        parts.append(f"`{_public(source)}` in diffusers' layout, written by sdx.")
    else:
        parts.append(_about(trained))
        if trained.grid:
            parts.append(f"![Pictures of step {trained.step}, prompts below them]({GRID})")
    parts.append(_use(address, dtype, trained))
    if trained is not None:
        parts += [_training(trained), _record(trained)]
    return "\n\n".join(parts) + "\n"


def _head(base: str) -> str:
    fields: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": next((name for part, name in LICENSES.items() if part in base), "other"),
    }
    if _is_hub_id(base):
        fields["base_model"] = base
    fields["tags"] = ["stable-diffusion", "text-to-image", "sdx"]
    # JSON is YAML, and quotes what needs quotes.
    lines = [f"{key}: {json.dumps(field)}" for key, field in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _about(trained: Trained) -> str:
    config, base = trained.config, f"`{_public(trained.config.model.pretrained)}`"
    start = "random weights"
    if config.model.init is Init.pretrained:
        start = f"`{_public(config.model.unet_checkpoint or config.model.pretrained)}`"
    learns, others = f"a UNet trained from {start}", "Autoencoder and text encoder are those"
    if config.train.text_encoder:
        learns += f" and a text encoder trained from {base}"
        others = "The autoencoder is that"
    kept = "averaged weights (EMA)" if trained.is_average else "weights"
    padding = ""
    if config.attention.mask_padding_tokens:
        padding = (
            " It was trained with cross-attention passing over what follows a caption's end "
            "(attention.mask_padding_tokens), which diffusers attends to: pictures drawn there "
            "differ from those of `sdx.sample` on the run."
        )
    pixels = resolve.resolution(config)
    work = f"{trained.step} steps of {resolve.global_batch_size(config)} images"
    return (
        f"Stable Diffusion in diffusers' layout: {learns} with sdx, the "
        f"{kept} after {work} of {pixels} x {pixels} pixels. {others} of {base}. There is no "
        f"safety checker.{padding}"
    )


def _use(address: str, dtype: str, trained: Trained | None) -> str:
    sample = trained.config.sample if trained else None
    prompt = sample.prompts[0] if sample and sample.prompts else EXAMPLE_PROMPT
    settings = ""
    if sample:
        settings = f", num_inference_steps={sample.num_steps}"
        settings += f", guidance_scale={sample.guidance_scale:g}"
        if sample.guidance_rescale:
            settings += f", guidance_rescale={sample.guidance_rescale:g}"
    return f"""\
## Use

The names in `text_encoder/model.safetensors` are those of transformers 5.6 and later.

```python
import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({json.dumps(address)}, torch_dtype=torch.{dtype})
pipe({json.dumps(prompt, ensure_ascii=False)}{settings}).images[0].save("picture.png")
```"""


def _training(trained: Trained) -> str:
    config = trained.config
    listed = {"diffusion.prediction_type": resolve.prediction_type(config).name} | {
        path: spelled(_public(here) if _says_where(path) else here)
        for path, leaf in leaves().items()
        if leaf.identity
        and has_effect(config, path)
        and not _NOT_LISTED.match(path)
        and (here := plain(value(config, path))) != plain(leaf.default)
    }
    results = {}
    losses = [row["loss"] for row in trained.rows[-MEAN_OVER:] if row.get("loss") is not None]
    if losses:
        results[f"loss, mean of the last {len(losses)} rows"] = f"{sum(losses) / len(losses):.4f}"
    for name, share in (trained.adherence or {}).items():
        results[f"pictures of held-out prompts: {name} right"] = f"{share:.2f}"
    parts = ["## Training", "What differs from sdx's defaults:", _table("key", listed)]
    if results:
        parts += ["## Results", _table(f"at step {trained.step}", results)]
    return "\n\n".join(parts)


def _record(trained: Trained) -> str:
    record = trained.record
    commit = record.get("git_commit") or "not recorded"
    if record.get("git_patch"):
        commit += ", with uncommitted changes"
    base = record.get("weights") or {}
    packages = record.get("packages") or {}
    devices = record.get("devices") or []
    rows = {
        "started": record.get("created"),
        "source code": commit,
        "commit of the base model": base.get("commit"),
        "devices": f"{len(devices)} x {devices[0]}" if devices else None,
        "Python": record.get("python"),
        **{name: packages.get(name) for name in _PACKAGES},
    }
    return "\n\n".join(["## Record", _table("run", {k: v for k, v in rows.items() if v})])


def _table(name: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {name} | |", "|---|---|", *_cells(rows)])


def _cells(rows: Mapping[str, str]) -> Iterable[str]:
    for key, text in rows.items():
        yield f"| {key} | {text.replace('|', '&#124;')} |"


def _says_where(path: str) -> bool:
    return path in ("data.dir", "run.resume_from")


def _public(source: str) -> str:
    """A Hub id as it is, of a path the last part."""
    return source if _is_hub_id(source) else Path(source).name


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(HUB_ID, source)) and not Path(source).expanduser().exists()
