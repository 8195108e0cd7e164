"""What an original checkpoint was trained with: by its metadata, or by the .yaml beside it.

The metadata is https://github.com/Stability-AI/ModelSpec's; the .yaml is the configuration that
CompVis' and Stability's repositories kept for each checkpoint (v2-inference-v.yaml), put beside the
file under its name as other programs expect it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from sdx.weights.errors import WeightsError

# What 1.x and 2.x were trained with, in the spelling of scheduler_config.json.
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
# Where the prediction type is told, and its values there.
METADATA_KEY = "modelspec.prediction_type"
METADATA = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
YAML_KEY = "parameterization"
YAML = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# Other keys of model.params in the .yaml: as scheduler_config.json and vae/config.json have them.
YAML_SCHEDULER = {
    "timesteps": "num_train_timesteps",
    "linear_start": "beta_start",
    "linear_end": "beta_end",
}
YAML_VAE = {"scale_factor": "scaling_factor"}


@dataclass(frozen=True)
class Training:
    """What is told, in keys of diffusers' configs."""

    prediction_type: str | None
    scheduler: dict[str, Any]
    vae: dict[str, Any]
    path: Path
    """The file that tells the prediction type."""


def read_training(path: Path, metadata: dict[str, str]) -> Training:
    """What is told of the training of `path`; WeightsError where two places contradict."""
    beside = path.with_suffix(".yaml")
    params = _params(beside)
    # The .yaml's default is epsilon; without any of its keys it is another program's.
    is_original = YAML_KEY in params or YAML_SCHEDULER.keys() & params.keys()
    told = {
        path: _known(path, METADATA_KEY, metadata.get(METADATA_KEY), METADATA),
        beside: _known(beside, YAML_KEY, params.get(YAML_KEY, "eps"), YAML)
        if is_original
        else None,
    }
    found = {where: kind for where, kind in told.items() if kind is not None}
    if len(set(found.values())) > 1:
        raise WeightsError(
            f"{path}: trained for {found[path]} by its metadata, for {found[beside]} by "
            f"{beside.name}; remove the wrong one."
        )
    where, prediction_type = next(iter(found.items()), (path, None))
    return Training(
        prediction_type=prediction_type,
        scheduler=SCHEDULER | _renamed(params, YAML_SCHEDULER),
        vae=_renamed(params, YAML_VAE),
        path=where,
    )


def _known(where: Path, key: str, value: str | None, known: dict[str, str]) -> str | None:
    if value is not None and value not in known:
        raise WeightsError(f"{where}: {key}={value}: sdx knows {', '.join(known)}.")
    return None if value is None else known[value]


def _params(path: Path) -> dict[str, Any]:
    """`model.params` of the .yaml; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path}: cannot be read as YAML ({reason}).") from error
    for key in ("model", "params"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _renamed(params: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {ours: params[theirs] for theirs, ours in keys.items() if theirs in params}
