"""FID's network against the same one in torch, from the file pytorch-fid would load."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sdx.models.inception import Inception
from sdx.models.layers import Numerics
from sdx.models.module import pure
from sdx.weights.errors import WeightsError
from sdx.weights.inception import load_inception
from tests.models.torch_inception import TorchInception, torch_inception

NUMERICS = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.HIGHEST)
NETWORK = pure(lambda rngs: Inception(numerics=NUMERICS, rngs=rngs))


@pytest.fixture(scope="module")
def theirs() -> TorchInception:
    return torch_inception()


def test_features_are_torchs(theirs: TorchInception, tmp_path: Path) -> None:
    torch.save(theirs.state_dict(), tmp_path / "pt_inception.pth")
    params = load_inception(tmp_path / "pt_inception.pth", NETWORK.abstract())
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 107, 83, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()
    found = np.asarray(jax.jit(NETWORK.apply)(params, pixels))
    assert wanted.std() > 0.1  # they are features, not the last bias
    np.testing.assert_allclose(found, wanted, atol=1e-4 * wanted.std(), rtol=1e-4)


def arrays(model: TorchInception) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, "1000 classes is torchvision's"),
        ({"AuxLogits.fc.bias": np.zeros(3, np.float32)}, "torchvision's"),
        (
            {"Mixed_5b.branch1x1.bn.bias": None, "extra.weight": np.zeros(2, np.float32)},
            "(?s)2 arrays do not fit.*branch1x1.bn.bias is missing.*extra.weight is in the file",
        ),
        (
            {"Conv2d_1a_3x3.conv.weight": np.zeros((32, 1, 3, 3), np.float32)},
            r"\(32, 1, 3, 3\) in the file, \(32, 3, 3, 3\) in the network",
        ),
    ],
)
def test_other_networks_are_refused(
    theirs: TorchInception, tmp_path: Path, changed: dict[str, np.ndarray | None], said: str
) -> None:
    found = {k: v for k, v in {**arrays(theirs), **changed}.items() if v is not None}
    save_file(found, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=said):
        load_inception(tmp_path / "other.safetensors", NETWORK.abstract())
