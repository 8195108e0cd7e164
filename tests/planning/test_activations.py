"""What of attention's arrays a device counts, by how devices share it."""

import pytest

from sdx.planning.activations import Layer, unet_layers
from tests.config.quick import quick

pytestmark = pytest.mark.fast


def attended(tensor: int, *overrides: str) -> Layer:
    """A layer with five heads of 64 over 64 x 64 latents, plain attention."""
    typed = ("model=sd21", "hardware=gpu_h100_8", "attention=dot_product", *overrides)
    return unet_layers(quick(typed), (64, 64), tensor)[1]


def test_heads_that_do_not_divide_stay_whole_and_queries_are_split() -> None:
    by_head, by_query = attended(2), attended(2, "attention.shard_sequence=true")
    weights = 5 * 4096 * (4096 + 80) * (4 + 2)  # over pixels and over tokens filled up to eights
    assert attended(1).rest - by_query.rest > weights / 2
    assert by_head.rest - by_query.rest == weights / 2 + 4 * 5 * 4096 * 64 * 2 / 2


def test_every_device_has_all_keys_where_queries_are_split() -> None:
    by_head, by_query = attended(5), attended(5, "attention.shard_sequence=true")
    assert by_query.rest - by_head.rest == pytest.approx(2 * 5 * 4096 * 64 * 2 * 4 / 5)
