"""Configurations for tests of rules and identities: the options are composed once, keys set on top.

Precedence and everything else that composing does is tested in test_compose, with the real thing.
"""

import copy
from collections.abc import Sequence
from functools import cache

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from sdx.config.compose import composing, typed
from sdx.config.errors import ConfigError
from sdx.config.folders import CONF
from sdx.config.overrides import inspect
from sdx.config.schema import Config


def quick(overrides: Sequence[str], base: Sequence[str] = ()) -> Config:
    """What `overrides` compose to, unchecked; keys of `base` are set before."""
    inspected = inspect(overrides, [CONF])
    choices = [f"{group}={option}" for group, option in inspected.choices.items()]
    node = copy.deepcopy(_composed(tuple(sorted(choices)), tuple(base)))
    for key, value in inspected.values.items():
        OmegaConf.update(node, key, value, force_add=isinstance(value, dict))
    config, problems = typed(node)
    if config is None or problems or inspected.problems:
        raise ConfigError([*inspected.problems, *problems])
    return config


@cache
def _composed(choices: tuple[str, ...], base: tuple[str, ...]) -> DictConfig:
    with composing([CONF]):
        node = compose(config_name="config", overrides=list(choices))
    for key, value in inspect(base, [CONF]).values.items():
        OmegaConf.update(node, key, value)
    return node
