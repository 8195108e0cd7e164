"""hydra/sweeper=sdx and sdx_search, as Hydra wants them.

Hydra 1.3 accepts sweepers only from here and executes this file more than once; what they do is in
sdx_launchers, imported when it is needed.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sdx.config.launching import SearchSettings, SweeperSettings


class _SdxSweeper(Sweeper):
    def __init__(self, **settings: Any):
        """`settings` are read from the whole configuration, where they have their types."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        hydra = config.hydra
        self._request: Any = task_function.request  # type: ignore[attr-defined]
        self._settings: Any = OmegaConf.to_object(hydra.sweeper)
        self._launcher = hydra.runtime.choices["hydra/launcher"]
        self._launcher_settings: Any = OmegaConf.to_object(hydra.launcher)


class GridSweeper(_SdxSweeper):
    """Every combination of the values typed."""

    def sweep(self, arguments: list[str]) -> None:
        from sdx_launchers.places import make_launcher
        from sdx_launchers.sweep.driver import sweep

        launcher = make_launcher(self._launcher, self._launcher_settings)
        self._request.exit_code = sweep(self._request, self._settings, self._launcher, launcher)


class SearchSweeper(_SdxSweeper):
    """Values that Optuna chooses."""

    def sweep(self, arguments: list[str]) -> None:
        from sdx_launchers.places import make_launcher
        from sdx_launchers.search.driver import search

        launcher = make_launcher(self._launcher, self._launcher_settings)
        self._request.exit_code = search(self._request, self._settings, self._launcher, launcher)


@dataclass
class GridNode(SweeperSettings):
    _target_: str = "hydra_plugins.sdx.sweepers.GridSweeper"


@dataclass
class SearchNode(SearchSettings):
    _target_: str = "hydra_plugins.sdx.sweepers.SearchSweeper"


for _name, _node in {"sdx": GridNode, "sdx_search": SearchNode}.items():
    ConfigStore.instance().store(
        group="hydra/sweeper", name=_name, node=_node, provider="sdx_launchers"
    )
