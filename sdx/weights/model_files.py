"""Where a model's files come from, and what every kind of source offers.

`open_model` is the one way in: a diffusers-layout folder, an original single file, a Hub id or the
embedded model. What it returns gives configs and tensors under today's names, in torch's layout.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sdx.config.schema import HUB_ID, ModelConfig
from sdx.weights.errors import WeightsError
from sdx.weights.folder import COMPONENTS, open_folder
from sdx.weights.hub import open_repository
from sdx.weights.original import SINGLE_FILES, open_original
from sdx.weights.tensor_files import Tensors

EMBEDDED = "tiny"


@runtime_checkable
class NetworkFiles(Protocol):
    """Files of one network or several; components are "unet", "vae", "text_encoder"."""

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


@runtime_checkable
class ModelFiles(NetworkFiles, Protocol):
    """Files of a whole model."""

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
    model: ModelConfig | None = None,
    say: Callable[[str], None] = print,
) -> ModelFiles:
    """The model at `source`, to read `components` of; the Hub is asked for their files only.

    `model` says what an original single file leaves open of its architecture. `say` gets a line for
    each component that lacks the variant, and for what is not read. Raises WeightsError where there
    is no such model, or not all of it.
    """
    folder = Path(str(files("sdx"))) / "assets" / EMBEDDED
    if source != EMBEDDED:
        folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise WeightsError(
                f"model.revision={revision}: {source} is a folder here, and only a repository of "
                "the Hub has revisions; leave it null."
            )
        return open_folder(source, folder, variant=variant, components=components, say=say)
    if folder.is_file() or folder.suffix in SINGLE_FILES:
        if revision is not None or variant is not None:
            raise WeightsError(
                f"{source}: a single file has no model.revision ({revision}) and no model.variant "
                f"({variant}); leave both null."
            )
        return open_original(source, folder, model, components=components, say=say)
    if re.fullmatch(HUB_ID, source):
        return open_repository(
            source, revision=revision, variant=variant, components=components, say=say
        )
    raise WeightsError(
        f"model.pretrained={source}: no such folder; give a folder that holds unet/, vae/ and "
        "text_encoder/, an original .safetensors file, a Hub id such as OWNER/NAME, or "
        f"{EMBEDDED}."
    )
