"""Names and layouts go both ways."""

import numpy as np
import pytest

from sdx.weights.names import (
    array_from_torch,
    array_to_torch,
    current_name,
    from_torch,
    to_torch,
)

pytestmark = pytest.mark.fast

# torch name and shape, our path and shape
ROWS = [
    ("conv_in.weight", (5, 4, 3, 2), "conv_in/kernel", (3, 2, 4, 5)),
    (
        "mid_block.attentions.0.proj_in.weight",
        (6, 4),
        "mid_block/attentions/0/proj_in/kernel",
        (4, 6),
    ),
    ("time_embedding.linear_1.weight", (6, 4), "time_embedding/linear_1/kernel", (4, 6)),
    ("conv_norm_out.weight", (4,), "conv_norm_out/scale", (4,)),
    ("encoder.layers.1.layer_norm2.bias", (4,), "encoder/layers/1/layer_norm2/bias", (4,)),
    ("final_layer_norm.weight", (4,), "final_layer_norm/scale", (4,)),
    ("embeddings.token_embedding.weight", (9, 4), "embeddings/token_embedding/embedding", (9, 4)),
]


@pytest.mark.parametrize(("name", "shape", "path", "our_shape"), ROWS)
def test_both_ways(
    name: str, shape: tuple[int, ...], path: str, our_shape: tuple[int, ...]
) -> None:
    theirs = np.arange(np.prod(shape)).reshape(shape)
    ours = array_from_torch(name, theirs)
    assert from_torch(name) == tuple(path.split("/"))
    assert to_torch(from_torch(name)) == name
    assert ours.shape == our_shape
    np.testing.assert_array_equal(array_to_torch(from_torch(name), ours), theirs)


def test_older_spellings() -> None:
    old = "encoder.mid_block.attentions.0.proj_attn.bias"
    assert current_name("vae", old) == "encoder.mid_block.attentions.0.to_out.0.bias"
    assert current_name("vae", "decoder.mid_block.attentions.0.query.weight") == (
        "decoder.mid_block.attentions.0.to_q.weight"
    )
    assert current_name("text_encoder", "text_model.final_layer_norm.bias") == (
        "final_layer_norm.bias"
    )
    assert current_name("text_encoder", "text_model.embeddings.position_ids") is None
    assert current_name("unet", "mid_block.attentions.0.key.x") == "mid_block.attentions.0.key.x"
