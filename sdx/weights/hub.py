"""Models on the Hugging Face Hub: what is read of a repository, and why one cannot be had.

The client keeps what it downloads and works from there without a network; it alone handles the
user's token, which comes from the environment or `hf auth login`.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from sdx.record.redact import redact
from sdx.weights.errors import WeightsError
from sdx.weights.folder import (
    CONFIGS,
    DiffusersFolder,
    choose_weights,
    list_files,
    open_folder,
    with_shards,
)

ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
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
    from huggingface_hub import hf_hub_download, snapshot_download

    components = list(components)
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=SMALL_FILES))
        commit = folder.name
        there = _listing(source, commit, folder)
        for weights in choose_weights(there, components, variant).values():
            if weights is None:  # `open_folder` says so
                continue
            hf_hub_download(source, weights, revision=commit)
            for shard in with_shards(folder, weights):
                hf_hub_download(source, shard, revision=commit)
    except WeightsError:
        raise
    except Exception as error:  # the client raises OSError, ValueError and httpx errors alike
        raise _unavailable(source, revision, error) from error
    return open_folder(
        source,
        folder,
        variant=variant,
        components=components,
        commit=commit,
        there=there,
        say=say,
    )


def _listing(source: str, commit: str, folder: Path) -> set[str]:
    """All files of the repository; without a network those that the cache has."""
    from huggingface_hub import HfApi

    try:
        return set(HfApi().list_repo_files(source, revision=commit))
    except Exception:  # offline, or deleted since it was cached: then the cache is all there is
        return list_files(folder)


def _unavailable(source: str, revision: str | None, error: Exception) -> WeightsError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    fix = next((fix for kind, fix in FIXES if kind in kinds), "check the name")
    mirrors = [
        re.sub(pattern, mirror, source)
        for pattern, mirror in MIRRORS
        if re.fullmatch(pattern, source)
    ]
    if mirrors:
        fix = f"it was deleted there; the same files are at {' and '.join(mirrors)}"
    wanted = source if revision is None else f"{source} (model.revision={revision})"
    return WeightsError(
        f"model.pretrained={wanted}: no folder of that name here, and it could not be had from the "
        f"Hub ({_reason(error)}); {fix}."
    )


def _reason(error: Exception) -> str:
    """The client's first line, without what follows `?` in an address: signatures do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact(re.sub(r"\?\S*", "", lines[0])) if lines else type(error).__name__
