"""Clusters, which live as long as the test session."""

from collections.abc import Iterator

import pytest

from tests.conftest import require
from tests.launchers.slurm_cluster import Cluster, Settings, missing, running
from tests.launchers.source_tree import SourceTree, copy_source


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A real SLURM of four nodes and two spare ones, with accounting."""
    yield from _cluster(Settings(spare_nodes=2))


@pytest.fixture(scope="session")
def slurm_without_accounting() -> Iterator[Cluster]:
    """A real SLURM of two nodes that forgets a job soon after its end, as `sacct` cannot tell."""
    yield from _cluster(Settings(nodes=2, accounting=False, remembers_s=10))


def _cluster(settings: Settings) -> Iterator[Cluster]:
    lacking = missing(settings)
    require(lacking is None, lacking or "")
    with running(settings) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> SourceTree:
    """A copy of the repository, with the faults that variables ask for."""
    return copy_source(tmp_path_factory.mktemp("source"))
