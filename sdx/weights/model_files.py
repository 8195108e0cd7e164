"""Where a model's files come from, and what every kind of source offers.

`open_model` is the one way in: a diffusers-layout folder, a Hub id or the embedded model. What it
returns gives configs and tensors under today's names, in torch's layout.
"""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS, DiffusersFolder
from sdx.weights.hub import download

EMBEDDED = "tiny"


@runtime_checkable
class Tensors(Protocol):
    """One component's tensors: torch's layout, today's diffusers and transformers names."""

    @property
    def path(self) -> Path:
        """The file, for messages."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape; reads no tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor in the file's own type; not kept."""
        ...


@runtime_checkable
class ModelFiles(Protocol):
    """A model's files; components are "unet", "vae", "text_encoder"."""

    @property
    def source(self) -> str:
        """What the user typed."""
        ...

    def config(self, component: str) -> dict[str, Any] | None:
        """The JSON config of a component or of "scheduler"; None where files do not say."""
        ...

    def where(self, component: str) -> str:
        """What `config(component)` was read from, for messages."""
        ...

    def tensors(self, component: str) -> AbstractContextManager[Tensors]:
        """The component's tensors, open to be read one by one."""
        ...

    def tokenizer_folder(self) -> Path:
        """A folder that `load_tokenizer` reads."""
        ...

    def provenance(self) -> dict[str, Any]:
        """For run.json: `source`, `commit` (or None), `files`: {relative path: sha256}."""
        ...


def open_model(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    components: Iterable[str] = COMPONENTS,
) -> ModelFiles:
    """The model at `source`; of a Hub repository only the files of `components` are downloaded.

    Raises WeightsError where there is no such model.
    """
    if source == EMBEDDED:
        return DiffusersFolder(source, Path(str(files("sdx"))) / "assets" / EMBEDDED)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return DiffusersFolder(source, folder, variant=variant)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise WeightsError(
            f"model.pretrained={source}: no such folder; give a folder that holds unet/, vae/ and "
            f"text_encoder/, a Hub id such as OWNER/NAME, or {EMBEDDED}."
        )
    return download(source, revision=revision, variant=variant, components=components)
