"""Where jobs can run, by the options of hydra/launcher."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from sdx.config.launching import LAUNCHERS, LauncherSettings
from sdx_launchers.jobs import Handle, Job, Launcher

_PLACES = {
    "sdx_local": ("sdx_launchers.local.launcher", "LocalLauncher"),
    "sdx_slurm": ("sdx_launchers.slurm.launcher", "SlurmLauncher"),
    "sdx_tpu": ("sdx_launchers.tpu.launcher", "TpuLauncher"),
}


def make_launcher(name: str, settings: LauncherSettings) -> Launcher:
    """The launcher of that name; what it needs is imported with it."""
    module, kind = _PLACES[name]
    return getattr(import_module(module), kind)(settings)


def attach_by(name: str, launcher: Launcher) -> Callable[[Job, Mapping[str, Any]], Handle | None]:
    """As `launcher.attach`, for jobs that other launchers started as well."""

    def attach(job: Job, launch: Mapping[str, Any]) -> Handle | None:
        other = launch["launcher"]
        if other == name:
            return launcher.attach(job, launch)
        return make_launcher(other, LAUNCHERS[other]()).attach(job, launch)

    return attach
