"""The CLIP that scores pictures, from a folder in transformers' layout (`CLIPModel`)."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from sdx.config.schema import HiddenAct, TextEncoderConfig
from sdx.models.clip_vision import CLIPConfig, CLIPVisionConfig
from sdx.models.module import Params
from sdx.weights.configs import ABSENT
from sdx.weights.errors import WeightsError
from sdx.weights.load import read_params
from sdx.weights.tensor_files import Renamed, open_tensors, read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""The first that is there is read."""
TEXT_DEFAULTS = ABSENT["text_encoder"]
_VISION: dict[str, Any] = {
    field.name: field.default for field in fields(CLIPVisionConfig) if field.name != "hidden_act"
}
EOS_TOKEN_ID = 49407
PROJECTION_DIM = 512
# In the files, and no part of a score.
IGNORED = (
    "logit_scale",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)


def read_clip_config(folder: Path) -> CLIPConfig:
    """What `folder`/config.json says; a WeightsError where it is another kind of model."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no config.json in it; give the folder of a CLIP in transformers' layout: "
            "config.json, model.safetensors, the tokenizer's files."
        )
    found = read_json(path)
    if found.get("model_type") != "clip":
        raise WeightsError(
            f"{path}: model_type={found.get('model_type')!r}, must be 'clip', with a text and an "
            "image encoder; openai/clip-vit-base-patch32 is one."
        )
    text = TEXT_DEFAULTS | {k: v for k, v in _part(found, "text").items() if v is not None}
    vision = {k: v for k, v in _part(found, "vision").items() if v is not None}
    known = CLIPVisionConfig.__dataclass_fields__
    vision = {k: vision[k] for k in known if k in vision}
    both = {"projection_dim": PROJECTION_DIM} | {
        k: v for k, v in found.items() if k == "projection_dim" and v is not None
    }
    eos_token_id = text.get("eos_token_id", EOS_TOKEN_ID)
    text = {key: text[key] for key in TEXT_DEFAULTS}
    faults = [*_faults("", both | {"eos_token_id": eos_token_id})]
    faults += [*_faults("text_config.", text), *_faults("vision_config.", _VISION | vision)]
    if faults:
        raise WeightsError(f"{path}: no CLIP can be built as it says:", faults)
    return CLIPConfig(
        text=TextEncoderConfig(**_enumerated(text)),
        vision=CLIPVisionConfig(**_enumerated(vision)),
        projection_dim=both["projection_dim"],
        eos_token_id=eos_token_id,
    )


def load_clip(folder: Path, abstract: Params) -> Params:
    """The parameters in `folder`, with the types and shardings of `abstract`."""
    with open_tensors(clip_weights(folder)) as tensors:
        names = {name: name for name in tensors.shapes() if name not in IGNORED}
        return read_params(Renamed(tensors, names), "CLIP", abstract)


def clip_weights(folder: Path) -> Path:
    """The file with the weights, or their index."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder}: none of {', '.join(WEIGHTS)} in it; get the whole model.")


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(f"{name}_config") or {}
    return part if isinstance(part, dict) else {}


def _faults(part: str, given: dict[str, Any]) -> Iterator[str]:
    """What of one part no network can be built from."""
    for name, found in given.items():
        if name == "hidden_act":
            if not isinstance(found, str) or found not in HiddenAct.__members__:
                allowed = ", ".join(HiddenAct.__members__)
                yield f"{part}hidden_act={found!r}: sdx has {allowed}"
        elif name == "layer_norm_eps":
            if not isinstance(found, int | float) or not 0 < found < 1:
                yield f"{part}layer_norm_eps={found!r}: must be a number between 0 and 1"
        elif type(found) is not int or found < 1:
            yield f"{part}{name}={found!r}: must be a whole number of at least 1"
    size, heads = given.get("hidden_size"), given.get("num_attention_heads")
    if isinstance(size, int) and isinstance(heads, int) and heads > 0 and size % heads:
        yield f"{part}hidden_size={size}: must be a multiple of num_attention_heads={heads}"


def _enumerated(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the activation as we know it."""
    if "hidden_act" not in fields:
        return fields
    return fields | {"hidden_act": HiddenAct[fields["hidden_act"]]}
