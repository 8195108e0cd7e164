"""Models of the published depth, small enough for every test run."""

from collections.abc import Iterator

import pytest
import torch

from tests.weights.conftest import UNETS, Reference, make_reference


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and idle ones spin where other work needs the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=list(UNETS))
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Four levels of UNet and autoencoder, as 1.x and as 2.x build them."""
    return make_reference(request.param, tmp_path_factory.mktemp(request.param), levels=4)
