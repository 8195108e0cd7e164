"""`model.*` keys that say where weights come from and what for; the schema's version."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from sdx.config.compose import from_saved, to_yaml
from sdx.config.errors import ConfigError
from sdx.experiment.attempt import Attempt
from sdx.experiment.setup import prepare
from sdx.models.module import flat
from sdx.weights.errors import WeightsError
from tests.effects.effect import Case, Effect
from tests.effects.files import ALONE, MARKS, PLAIN, VARIANT, rewrite
from tests.effects.tracing import Observer
from tests.weights.hub_server import COMMIT, Hub, Repository, serve

NAMES = {PLAIN: "model", VARIANT: "model, fp16", ALONE: "alone"}
BRANCH, MODEL = "v2", "somebody/a-model"


def read_from(network: str) -> Observer:
    """Which files a run takes the weights of a network from."""

    def observe(case: Case) -> str:
        trained, frozen = case.program.abstract_state.params, case.program.abstract_frozen
        attempt: Any = SimpleNamespace(setup=case.setup)
        read = Attempt._load(attempt, {network: {**trained, **frozen}[network]})[network]
        number = float(np.ravel(flat(read)[tuple(MARKS[network].split("."))])[0])
        return NAMES.get(number, "other files")

    return observe


def unet(case: Case) -> str:
    """Where the UNet comes from."""
    return "chance" if case.setup.unet is None else read_from("unet")(case)


def asked_for(case: Case) -> set[str]:
    """Revisions that the Hub is asked for."""
    folder = case.folder.parent / "model"
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    repository = Repository(files, revisions=("main", BRANCH, COMMIT))
    with serve(Hub({MODEL: repository})) as hub, pytest.MonkeyPatch.context() as patch:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(case.folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(case.folder / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert case.setup is not None
    asked = {path.partition("/revision/")[2].partition("?")[0] for _, path in hub.requests}
    return asked - {"", COMMIT}  # what it answers is asked for next


def scaling_factor(case: Case) -> float | str:
    """Of a start from files that say 0.5."""
    rewrite(case.folder.parent / "model", "vae", scaling_factor=0.5)
    try:
        return prepare(case.config).config.model.vae.scaling_factor
    except WeightsError:
        return "refused"
    finally:
        rewrite(case.folder.parent / "model", "vae", scaling_factor=1.0)


def side(case: Case) -> tuple[int, ...]:
    """Of training images."""
    images: Any = case.program.abstract_batch.images
    return images.shape[1:3]


def saved_and_read(case: Case) -> str:
    """What becomes of this configuration when a run continues from it."""
    file = case.folder / "config.yaml"
    file.write_text(to_yaml(case.config))
    try:
        return f"version {from_saved(file).schema_version}"
    except ConfigError as error:
        return error.problems[0].rule


PRETRAINED = ("model.pretrained={files}/model", "model.init=pretrained")

EFFECTS = [
    Effect(
        "model.name",
        "mine",
        lambda case: case.setup.paths.root.name.partition("-")[0],
        "tiny",
        "mine",
    ),
    Effect("model.pretrained", "{files}/model", read_from("vae"), "other files", "model"),
    Effect("model.variant", "fp16", read_from("vae"), "model", "model, fp16", given=PRETRAINED),
    Effect(
        "model.revision",
        BRANCH,
        asked_for,
        {"main"},
        {BRANCH},
        given=(f"model.pretrained={MODEL}",),
    ),
    Effect("model.init", "random", unet, "model", "chance", given=PRETRAINED),
    Effect("model.unet_checkpoint", "{files}/alone", unet, "model", "alone", given=PRETRAINED),
    Effect(
        "model.from_files",
        "true",
        scaling_factor,
        "refused",
        0.5,
        given=("model.pretrained={files}/model",),
    ),
    Effect(
        "model.resolution",
        "24",
        side,
        (16, 16),
        (24, 24),
        given=("data.resolution=null", "model.resolution=16", "model.unet.sample_size=2"),
        along=("model.unet.sample_size=3",),
    ),
    Effect(
        "model.unet.sample_size",
        "4",
        lambda case: [problem.split(";")[0] for problem in case.problems],
        [],
        ["model.resolution=64: must be 8 x model.unet.sample_size=4"],
        refused=True,
    ),
    Effect("data.resolution", "24", side, (16, 16), (24, 24)),
    Effect(
        "schema_version",
        "0",
        saved_and_read,
        "version 1",
        "schema_version 0 is not known to this sdx, which writes 1",
    ),
]
