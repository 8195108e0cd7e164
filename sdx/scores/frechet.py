"""The Fréchet distance between two sets of features, each taken as a Gaussian (FID).

Heusel et al. 2017 (arXiv 1706.08500), equation 6, of Dowson & Landau 1982:

    d² = |mean₁ − mean₂|² + tr(C₁) + tr(C₂) − 2 tr((C₁ C₂)^½)

All in float64, as pytorch-fid and TTUR do. They take the root of the product by
`scipy.linalg.sqrtm`, which is inexact where C₁ C₂ is singular; here tr((C₁ C₂)^½) is the sum of the
singular values of C₁^½ C₂^½, each root from the eigenvalues of one symmetric matrix.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Float64

MEAN, COVARIANCE = "mu", "sigma"  # TTUR's and pytorch-fid's names in the .npz


class StatisticsError(ValueError):
    """Statistics that cannot be read, or not be compared."""


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance (over n − 1) of features."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]


class FeatureSums:
    """Statistics of features that come in batches; float64, one pass.

    Sums of two sets are joined as in Chan, Golub & LeVeque 1983 (equations 1.5): no difference of
    large numbers is taken.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self._mean = np.zeros(num_features)
        self._products = np.zeros((num_features, num_features))

    def add(self, features: Float[np.ndarray, "b d"]) -> None:
        """Takes a batch in; StatisticsError where a number in it is not finite."""
        if not len(features):
            return
        if not np.isfinite(features).all():
            raise StatisticsError(
                "FID: features are not finite; the weights given as --inception are damaged."
            )
        batch = features.astype(np.float64)
        mean = batch.mean(0)
        centred, step = batch - mean, mean - self._mean
        total = self.count + len(batch)
        self._products += centred.T @ centred
        self._products += np.outer(step, step) * (self.count * len(batch) / total)
        self._mean = self._mean + step * (len(batch) / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Of all that came in; StatisticsError where that is fewer than two."""
        if self.count < 2:
            raise StatisticsError(
                f"FID: {self.count} pictures have no covariance; give at least 2, and more than "
                f"{len(self._mean)} for a value to trust."
            )
        return Statistics(self._mean, self._products / (self.count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """d² between two Gaussians; never below 0."""
    if len(a.mean) != len(b.mean):
        raise StatisticsError(
            f"FID: statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared."
        )
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    step = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(step @ step + spread - 2 * overlap))


def read_statistics(path: Path) -> Statistics:
    """The mean and covariance in an .npz as pytorch-fid and TTUR write it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is none"
        raise StatisticsError(
            f"{path}: cannot be read as .npz ({reason}); give a file with {MEAN} and {COVARIANCE}, "
            "or a folder of pictures."
        ) from error
    shapes = {name: array.shape for name, array in found.items()}
    size = shapes.get(MEAN, (0,))
    if len(size) != 1 or size[0] == 0 or shapes.get(COVARIANCE) != size * 2:
        raise StatisticsError(
            f"{path}: holds {shapes}, must hold {MEAN} (d,) and {COVARIANCE} (d, d), as "
            "`pytorch_fid --save-stats` writes them."
        )
    if not all(_is_finite(found[name]) for name in (MEAN, COVARIANCE)):
        raise StatisticsError(f"{path}: holds numbers that are not finite; get it again.")
    return Statistics(found[MEAN].astype(np.float64), found[COVARIANCE].astype(np.float64))


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Writes the .npz that `read_statistics` and other tools read, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    arrays: dict[str, Any] = {MEAN: statistics.mean, COVARIANCE: statistics.covariance}
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    part.replace(path)


def _root(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """R with R Rᵀ = covariance; directions without spread, to rounding, are left out."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    smallest = values[-1] * len(values) * np.finfo(np.float64).eps
    kept = values > smallest
    return vectors[:, kept] * np.sqrt(values[kept])


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and bool(np.isfinite(array).all())
