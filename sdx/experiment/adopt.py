"""`model.from_files`: the architecture in the files takes the place of what model= says."""

from dataclasses import replace
from typing import Any

from sdx.config.check import check
from sdx.config.errors import ConfigError
from sdx.config.leaves import flatten, spelled
from sdx.config.schema import Config
from sdx.weights.configs import (
    read_prediction_type,
    read_text_encoder_config,
    read_unet_config,
    read_vae_config,
)
from sdx.weights.model_files import ModelFiles, NetworkFiles


def adopt(config: Config, weights: ModelFiles, unet: NetworkFiles | None) -> Config:
    """`config` as if the architecture of the files had been typed; prints what that changes.

    Without a `unet` (training from random) the UNet stays as it is, and so does the size of its
    images: its native latents follow from the autoencoder. Raises ConfigError where the
    result breaks a rule.
    """
    vae = read_vae_config(weights)
    found: dict[str, Any] = {"vae": vae, "text_encoder": read_text_encoder_config(weights)}
    if unet is None:
        latents = config.model.resolution // vae.factor
        found["unet"] = replace(config.model.unet, sample_size=latents)
    else:
        found["unet"] = read_unet_config(unet)
        found["resolution"] = found["unet"].sample_size * vae.factor
        if unet.config("scheduler") is not None:
            found["prediction_type"] = read_prediction_type(unet)
    adopted = replace(config, model=replace(config.model, from_files=False, **found))
    if problems := check(adopted):
        raise ConfigError(problems)
    before, after = flatten(config), flatten(adopted)
    changes = [
        f"{path}={spelled(after[path])}"
        for path in after
        if after[path] != before[path] and path != "model.from_files"
    ]
    print(f"taken from the files: {' '.join(changes) or f'what model={config.model.name} says'}")
    return adopted
