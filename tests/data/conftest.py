"""Caches of the user and of `datasets`, in the test's own folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is remembered between runs, and the copies that `datasets` makes, lie in the test's
    folder.
    """
    import datasets

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
