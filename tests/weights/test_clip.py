"""What the config.json of a CLIP must say."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdx.weights.clip import read_clip_config
from sdx.weights.errors import WeightsError

pytestmark = pytest.mark.fast


def write(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    return folder


def test_what_is_left_out_or_null_is_transformers_default(tmp_path: Path) -> None:
    text = {"eos_token_id": 2, "num_hidden_layers": None}
    config = read_clip_config(write(tmp_path, projection_dim=None, text_config=text))
    assert (config.projection_dim, config.eos_token_id) == (512, 2)
    assert (config.text.num_hidden_layers, config.vision.patch_size) == (12, 32)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("text_config", {"hidden_act": ["gelu"]}, "hidden_act=['gelu']: sdx has gelu, quick_gelu"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act='relu': sdx has gelu, quick_gelu"),
        ("text_config", {"num_attention_heads": 7}, "hidden_size=512: must be a multiple of num_"),
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads=0: must be a whole"),
        ("vision_config", {"hidden_size": "big"}, "hidden_size='big': must be a whole number"),
        ("text_config", {"layer_norm_eps": 0}, "layer_norm_eps=0: must be a number between 0 and"),
    ],
)
def test_a_config_of_no_clip_is_told(
    tmp_path: Path, part: str, change: dict[str, Any], said: str
) -> None:
    folder = write(tmp_path, **{part: change})
    with pytest.raises(WeightsError) as caught:
        read_clip_config(folder)
    assert f"{part}.{said}" in str(caught.value)
