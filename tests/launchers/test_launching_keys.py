"""No key of a sweeper or launcher is there in vain: the code of each reads it from its settings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdx.config.launching import (
    LocalSettings,
    SearchSettings,
    SlurmSettings,
    SweeperSettings,
    TpuSettings,
)
from sdx.config.leaves import leaves_of

pytestmark = pytest.mark.fast

READERS = {
    SweeperSettings: ("launchers/sdx_launchers/sweep/driver.py", "sdx/config/sweeping.py"),
    SearchSettings: ("launchers/sdx_launchers/search/*.py",),
    LocalSettings: ("launchers/sdx_launchers/local/launcher.py",),
    SlurmSettings: ("launchers/sdx_launchers/slurm/*.py",),
    TpuSettings: ("launchers/sdx_launchers/tpu/*.py",),
}
"""The files whose `settings` are of that class."""


def read_in(text: str) -> Iterator[str]:
    """Attributes of whatever is called `settings`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if re.search(r"settings$", ast.unparse(node.value)):
                yield node.attr


@pytest.mark.parametrize("cls", READERS)
def test_every_key_is_read(cls: type, repository: Path) -> None:
    files = [file for name in READERS[cls] for file in repository.glob(name)]
    read = {name for file in files for name in read_in(file.read_text())}
    assert [name for name in leaves_of(cls) if name not in read] == []
