"""Datasets on the Hugging Face Hub: which files are downloaded, and why they cannot be had.

The client keeps what it downloads and works from there without a network; it alone handles the
user's token, which comes from the environment or `hf auth login`. Files are data: no script of a
repository is downloaded or run.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdx.data.source import DataError
from sdx.record.redact import said_by

# Answers after which a download is tried again, and when.
_BUSY = (429, 500, 502, 503, 504)
_WAITS_S = (1.0, 4.0, 16.0)
_COMMIT = re.compile("[0-9a-f]{40}")
# Data sets that are gone, and what their owners or the peers use today.
_GONE = {
    "lambdalabs/pokemon-blip-captions": (
        "its images were taken down after a DMCA notice of February 2024; use data=pokemon (other"
        " captions of them, for what is not commercial) or data=naruto"
    ),
}
_INSTEAD = {"diffusers/pokemon-gpt4-captions": "; another set to try: data=naruto"}
# What to do, by the client's exception; the first that fits.
_FIXES = (
    ("GatedRepoError", "accept its terms on its page, then log in with `hf auth login`"),
    ("RevisionNotFoundError", "check data.revision"),
    (
        "RepositoryNotFoundError",
        "check data.name; if it is private, log in with `hf auth login`; a copy of it is read with"
        " data.dir=FOLDER",
    ),
    (
        "OfflineModeIsEnabled",
        "unset HF_HUB_OFFLINE, or give a copy of it: data.dir=FOLDER",
    ),
    (
        "LocalEntryNotFoundError",
        "the Hub cannot be reached, and it is not in the cache: download it where there is a"
        " network (`hf download --repo-type dataset NAME --local-dir FOLDER`) and give"
        " data.dir=FOLDER",
    ),
    ("OSError", "check network and disk, or give a copy of it: data.dir=FOLDER"),
)


@dataclass(frozen=True)
class Repository:
    """A dataset's files at one commit, of which those that are asked for are downloaded.

    `folder` is where they lie, as links to content in `root`.
    """

    name: str
    commit: str
    folder: Path
    files: tuple[str, ...]

    @property
    def root(self) -> Path:
        """The repository's whole folder in the client's cache."""
        return self.folder.parents[1].resolve()

    def download(self, files: Iterable[str]) -> None:
        """Brings these files into `folder`, unless they are there."""
        missing = [file for file in files if not (self.folder / file).exists()]
        try:
            for file in missing:
                _download(self.name, file, self.commit)
        except Exception as error:
            raise _unavailable(self.name, self.commit, error) from error


def open_repository(name: str, revision: str | None) -> Repository:
    """The repository at `revision`, by default its main branch, with its card downloaded.

    Without the Hub, what the cache has of it. Raises DataError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=["README.md"]
            )
        )
    except Exception as error:  # the client raises OSError, ValueError and httpx errors alike
        raise _unavailable(name, revision, error) from error
    return Repository(name, folder.name, folder, _files(name, folder))


def _files(name: str, folder: Path) -> tuple[str, ...]:
    """Names of all the repository has; without the Hub, of what the cache has."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().dataset_info(name, revision=folder.name).siblings or []
        return tuple(sorted(file.rfilename for file in siblings))
    except Exception:  # offline, or deleted since it was cached
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return tuple(sorted(path.as_posix() for path in found))


def _download(name: str, file: str, commit: str) -> None:
    """One file into the cache; the client itself does not ask again when the Hub is busy."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    for wait_s in (*_WAITS_S, None):
        try:
            hf_hub_download(name, file, repo_type="dataset", revision=commit)
            return
        except HfHubHTTPError as error:
            if wait_s is None or error.response.status_code not in _BUSY:
                raise
            time.sleep(wait_s)


def _unavailable(name: str, revision: str | None, error: Exception) -> DataError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    causes = {type(cause).__name__ for cause in (error.__cause__, error.__context__) if cause}
    fix = next((fix for kind, fix in _FIXES if kind in kinds | causes), "check data.name")
    fix = _GONE.get(name, fix).replace("NAME", name) + _INSTEAD.get(name, "")
    wanted = name if revision is None else f"{name} (data.revision={revision})"
    return DataError(
        f"data.name={wanted}: could not be had from the Hugging Face Hub ({said_by(error)}); {fix}."
    )
