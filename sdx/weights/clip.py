"""The CLIP that scores pictures, from a folder in transformers' layout (`CLIPModel`)."""

from pathlib import Path
from typing import Any

from sdx.config.schema import HiddenAct, TextEncoderConfig
from sdx.models.clip_vision import CLIPConfig, CLIPVisionConfig
from sdx.models.module import Params
from sdx.weights.errors import WeightsError
from sdx.weights.load import read_params
from sdx.weights.tensor_files import Renamed, open_tensors, read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""The first that is there is read."""
# transformers' defaults (models/clip/configuration_clip.py), for configs that leave them out.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
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
    try:
        return CLIPConfig(
            text=TextEncoderConfig(**_enumerated({key: text[key] for key in TEXT_DEFAULTS})),
            vision=CLIPVisionConfig(**_enumerated({k: vision[k] for k in known if k in vision})),
            projection_dim=found.get("projection_dim", PROJECTION_DIM),
            eos_token_id=text.get("eos_token_id", EOS_TOKEN_ID),
        )
    except KeyError as error:
        raise WeightsError(
            f"{path}: hidden_act={error.args[0]!r}; sdx has {', '.join(HiddenAct.__members__)}."
        ) from error


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


def _enumerated(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the activation as we know it; KeyError for another one."""
    if "hidden_act" not in fields:
        return fields
    return fields | {"hidden_act": HiddenAct[fields["hidden_act"]]}
