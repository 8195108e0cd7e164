"""FID's arithmetic against the formulas as the reference tools compute them."""

from pathlib import Path

import numpy as np
import pytest
from scipy import linalg

from sdx.scores.frechet import (
    FeatureSums,
    Statistics,
    StatisticsError,
    frechet_distance,
    read_statistics,
    save_statistics,
)

pytestmark = pytest.mark.fast


def features(seed: int, count: int, size: int) -> np.ndarray:
    """Correlated, far from zero, as pool3's are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, size)) @ rng.normal(size=(size, size))
    return (mixed + 3 * rng.normal(size=size)).astype(np.float32)


def statistics(*batches: np.ndarray) -> Statistics:
    sums = FeatureSums(batches[0].shape[1])
    for batch in batches:
        sums.add(batch)
    return sums.statistics()


def by_sqrtm(a: Statistics, b: Statistics) -> float:
    """The formula with scipy's root of the product."""
    root = linalg.sqrtm(a.covariance @ b.covariance)
    step = a.mean - b.mean
    return float(step @ step + np.trace(a.covariance + b.covariance - 2 * np.real(root)))


def test_statistics_of_batches_are_numpys_of_all() -> None:
    found = features(0, 101, 12) + 1000  # the mean is large beside the spread
    ours = statistics(found[:1], found[1:50], found[50:50], found[50:])
    exact = found.astype(np.float64)
    np.testing.assert_allclose(ours.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)


def test_distance_is_that_of_scipys_root() -> None:
    a, b = statistics(features(1, 400, 24)), statistics(features(2, 300, 24))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    (mean_a, mean_b), (spread_a, spread_b) = rng.normal(size=(2, 16)), rng.random((2, 16))
    a, b = Statistics(mean_a, np.diag(spread_a**2)), Statistics(mean_b, np.diag(spread_b**2))
    closed = np.sum((mean_a - mean_b) ** 2) + np.sum((spread_a - spread_b) ** 2)
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-12)


def test_a_set_has_no_distance_to_itself_even_with_fewer_pictures_than_features() -> None:
    """There sqrtm of the singular product is off by far more."""
    few = statistics(features(4, 9, 40))
    assert frechet_distance(few, few) < 1e-9 * np.trace(few.covariance)


def test_singular_covariances_have_the_exact_distance() -> None:
    """Two sets whose features vary in 3 of 40 directions, the same ones, by known amounts."""
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0][:, :3]
    spreads = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 5.0])
    a, b = (Statistics(np.zeros(40), basis * s**2 @ basis.T) for s in spreads)
    assert frechet_distance(a, b) == pytest.approx(np.sum((spreads[0] - spreads[1]) ** 2), rel=1e-9)


def test_statistics_are_kept_in_the_common_layout(tmp_path: Path) -> None:
    ours = statistics(features(6, 30, 5))
    save_statistics(ours, tmp_path / "new" / "real.npz")
    with np.load(tmp_path / "new" / "real.npz") as file:
        assert sorted(file.files) == ["mu", "sigma"]
        np.testing.assert_array_equal(file["sigma"], ours.covariance)
    again = read_statistics(tmp_path / "new" / "real.npz")
    assert frechet_distance(again, ours) < 1e-9


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mean": np.zeros(3)}, r"must hold mu \(d,\) and sigma \(d, d\)"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "must hold"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "not finite"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict, said: str) -> None:
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(StatisticsError, match=said):
        read_statistics(tmp_path / "other.npz")


def test_what_is_no_statistics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(StatisticsError, match="cannot be read as .npz"):
        read_statistics(tmp_path / "text.npz")
    with pytest.raises(StatisticsError, match="1 pictures have no covariance"):
        statistics(np.ones((1, 4), np.float32))
    with pytest.raises(StatisticsError, match="not finite"):
        statistics(np.full((3, 4), np.inf, np.float32))
    with pytest.raises(StatisticsError, match="4 and of 5 features"):
        frechet_distance(statistics(features(0, 9, 4)), statistics(features(0, 9, 5)))
