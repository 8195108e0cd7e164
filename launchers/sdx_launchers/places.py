"""Where jobs can run, by the options of hydra/launcher."""

from importlib import import_module

from sdx.config.launching import LauncherSettings
from sdx_launchers.jobs import Launcher

_PLACES = {
    "sdx_local": ("sdx_launchers.local", "LocalLauncher"),
    "sdx_slurm": ("sdx_launchers.slurm", "SlurmLauncher"),
    "sdx_tpu": ("sdx_launchers.tpu", "TpuLauncher"),
}


def make_launcher(name: str, settings: LauncherSettings) -> Launcher:
    """The launcher of that name; what it needs is imported with it."""
    module, kind = _PLACES[name]
    return getattr(import_module(module), kind)(settings)
