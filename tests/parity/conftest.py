"""Models of the published depth, small enough for every test run."""

import pytest

from tests.weights.conftest import UNETS, Reference, make_reference


@pytest.fixture(scope="session", params=list(UNETS))
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Four levels of UNet and autoencoder, as 1.x and as 2.x build them."""
    return make_reference(request.param, tmp_path_factory.mktemp(request.param), levels=4)
