"""Models on the Hugging Face Hub."""

from collections.abc import Iterable
from pathlib import Path

from sdx.weights.errors import WeightsError
from sdx.weights.folder import STEMS, DiffusersFolder

# All that a run reads of a Hub repository: not its pickles, safety checker and other precisions.
PATTERNS = ["*.json", "*/*.json", "tokenizer/*"]


def download(
    source: str, *, revision: str | None, variant: str | None, components: Iterable[str]
) -> DiffusersFolder:
    """The repository `source`, downloaded unless the cache has it."""
    # Imported here: it costs 0.3 s, and local runs never need it.
    from huggingface_hub import snapshot_download

    suffix = f".{variant}.safetensors" if variant else ".safetensors"
    weights = [f"{component}/{STEMS[component]}{suffix}" for component in components]
    try:
        folder = snapshot_download(source, revision=revision, allow_patterns=[*PATTERNS, *weights])
    except Exception as error:  # the Hub's client raises OSError, ValueError and httpx errors alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"model.pretrained={source}: no folder of that name here, and it could not be had from "
            f"the Hub ({reason}); check the name, log in with `hf auth login`, or give a folder."
        ) from error
    return DiffusersFolder(source, Path(folder), variant)
