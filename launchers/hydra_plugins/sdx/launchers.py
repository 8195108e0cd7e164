"""hydra/launcher=sdx_local, sdx_slurm and sdx_tpu, as Hydra wants them.

Hydra 1.3 accepts launchers only from here and executes this file more than once; what they do is in
sdx_launchers, imported when it is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sdx.config.launching import LocalSettings, SlurmSettings, TpuSettings


class SdxLauncher(Launcher):
    """Starts jobs for sweepers that are not sdx's; its own start them without it."""

    def __init__(self, **settings: Any):
        """`settings` are read from the whole configuration, where they have their types."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._task, self._config = task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from sdx_launchers.sweep.driver import launch

        hydra = self._config.hydra
        name = hydra.runtime.choices["hydra/launcher"]
        settings = OmegaConf.to_object(hydra.launcher)
        values = launch(self._task.request, name, settings, job_overrides)  # type: ignore[attr-defined]
        return [
            JobReturn(overrides=list(overrides), _return_value=value, status=JobStatus.COMPLETED)
            for overrides, value in zip(job_overrides, values, strict=True)
        ]


@dataclass
class LocalNode(LocalSettings):
    _target_: str = "hydra_plugins.sdx.launchers.SdxLauncher"


@dataclass
class SlurmNode(SlurmSettings):
    _target_: str = "hydra_plugins.sdx.launchers.SdxLauncher"


@dataclass
class TpuNode(TpuSettings):
    _target_: str = "hydra_plugins.sdx.launchers.SdxLauncher"


for _name, _node in {"sdx_local": LocalNode, "sdx_slurm": SlurmNode, "sdx_tpu": TpuNode}.items():
    ConfigStore.instance().store(
        group="hydra/launcher", name=_name, node=_node, provider="sdx_launchers"
    )
