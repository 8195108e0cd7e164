"""Where the options of groups lie: our `conf/`, then the user's folders."""

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "conf" / "config.yaml").is_file() else None

CONF: Path = (CHECKOUT or _PACKAGE) / "conf"  # the checkout's folder, or its copy in a wheel


def reach_launchers() -> None:
    """Puts the checkout's launchers on the path, before those of another sdx: an installed sdx has
    them beside it. Hydra looks for its plugins once, with its first composition."""
    if CHECKOUT is not None and str(CHECKOUT / "launchers") not in sys.path:
        sys.path.insert(0, str(CHECKOUT / "launchers"))


def option_folders(config_dir: Path | None = None) -> list[Path]:
    """Folders that hold options of groups, first to last: ours, `config_dir`, `./conf`."""
    more = [folder.resolve() for folder in (config_dir, Path("conf")) if folder is not None]
    return [CONF, *(folder for folder in more if folder.is_dir() and folder != CONF)]


def group_options(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Options of every group from all `folders`; the groups are those of ours."""
    names = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    return {
        name: sorted({file.stem for folder in folders for file in (folder / name).glob("*.yaml")})
        for name in names
    }


def default_options() -> dict[str, str]:
    """The option of each group in the base configuration; groups that are off are left out."""
    entries = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    assert isinstance(entries, dict)
    chosen = [entry for entry in entries["defaults"] if isinstance(entry, dict)]
    return {
        group: option
        for entry in chosen
        for group, option in entry.items()
        if option is not None and not group.startswith("override ")
    }
