"""FID and CLIP score of a folder of pictures, with what they were measured by."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sdx.data.pictures import Picture, list_pictures
from sdx.data.source import DataError
from sdx.experiment.evaluation.scoring import ClipNetwork, FidNetwork, digest, pictures_digest, show
from sdx.models.inception import NUM_FEATURES
from sdx.scores.frechet import (
    Statistics,
    StatisticsError,
    frechet_distance,
    read_statistics,
    save_statistics,
)
from sdx.weights.clip import clip_weights

Say = Callable[[str], None]
Row = dict[str, Any]


class PictureJudge:
    """The networks asked for, and what they say of a folder.

    What is wrong with the files given is raised when it is made, before anything costs time.
    """

    def __init__(
        self,
        mesh: Mesh,
        batch_size: int,
        *,
        reference: Path | None,
        inception: Path | None,
        save_statistics: Path | None,
        clip: Path | None,
        say: Say,
    ):
        self._batch_size, self._say = batch_size, say
        self._reference, self._inception, self._clip_folder = reference, inception, clip
        self._save_statistics = save_statistics
        self._known = None if reference is None else _known_statistics(reference)
        self._fid = None if inception is None else FidNetwork(inception, mesh, batch_size)
        self._clip = None if clip is None else ClipNetwork(clip, mesh, batch_size)

    def __call__(self, folder: Path) -> Row:
        """Scores of the pictures in `folder`."""
        pictures = list_pictures(folder)
        if self._clip is not None:
            _check_captions(folder, pictures)
        networks = [network for network in (self._fid, self._clip) if network is not None]
        bad = show(networks, pictures, self._batch_size, say=self._say)
        row: Row = {
            "pictures": {
                "folder": str(folder),
                "count": len(pictures) - len(bad),
                "left_out": len(bad),
                "sha256": pictures_digest(pictures),
            }
        }
        if self._fid is not None:
            row |= self._judge_features(self._fid)
        if self._clip is not None:
            row |= self._judge_captions(self._clip)
        return row

    def _judge_features(self, network: FidNetwork) -> Row:
        count, statistics = network.sums.count, network.sums.statistics()
        if self._save_statistics is not None:
            save_statistics(statistics, self._save_statistics)
            self._say(f"statistics: {self._save_statistics}")
        if self._reference is None:
            return {}
        assert self._inception is not None
        reference, where = self._known or self._look_at(network, self._reference)
        if min(count, where["count"] or count) <= NUM_FEATURES:
            self._say(
                f"FID of {NUM_FEATURES} pictures or fewer is biased upwards, the more the fewer: "
                "compare it only with one of as many. Published ones are of 10,000 to 50,000."
            )
        return {
            "fid": frechet_distance(statistics, reference),
            "fid_of": {
                "convention": "pytorch-fid",
                "count": count,
                "reference": where,
                "inception": _file(self._inception),
            },
        }

    def _judge_captions(self, network: ClipNetwork) -> Row:
        assert self._clip_folder is not None
        scores = np.asarray(network.scores)
        error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
        return {
            "clip_score": float(scores.mean()),
            "clip_score_of": {
                "convention": "100 * max(cos, 0)",
                "count": len(scores),
                "standard_error": error,
                "clip": {"folder": str(self._clip_folder)} | _file(clip_weights(self._clip_folder)),
            },
        }

    def _look_at(self, network: FidNetwork, folder: Path) -> tuple[Statistics, Row]:
        self._say(f"looking at {folder}; statistics of it (--save-statistics) would spare that")
        pictures = list_pictures(folder)
        network.start()
        show([network], pictures, self._batch_size, say=self._say)
        where = {"path": str(folder), "sha256": pictures_digest(pictures)}
        return network.sums.statistics(), where | {"count": network.sums.count}


def _known_statistics(path: Path) -> tuple[Statistics, Row] | None:
    """The statistics in a file; None of a folder of pictures, which is looked at later."""
    if path.is_dir():
        list_pictures(path)
        return None
    statistics = read_statistics(path)
    if len(statistics.mean) != NUM_FEATURES:
        raise StatisticsError(
            f"--fid {path}: statistics of {len(statistics.mean)} features, must be of the "
            f"{NUM_FEATURES} of pool3."
        )
    return statistics, _file(path) | {"count": None}


def _check_captions(folder: Path, pictures: Sequence[Picture]) -> None:
    """Raises DataError unless each picture has a caption."""
    without = [picture.path.name for picture in pictures if picture.caption is None]
    if without:
        raise DataError(
            f"--clip: {len(without)} of {len(pictures)} pictures of {folder} have no caption, "
            f"{without[0]} for one; give each a row in metadata.jsonl "
            '({"file_name": "0001.png", "text": "a caption"}) or a .txt file beside it.'
        )


def _file(path: Path) -> Row:
    return {"path": str(path), "sha256": digest(path)}
