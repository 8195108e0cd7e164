"""`attention.mask_padding_tokens`: what follows a caption's end is as if it were not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.models.attention import dot_product_attention
from sdx.models.networks import Networks, make_networks
from tests.micro import NUM_TOKENS, micro_model

END = 63  # the highest id, as in CLIP's vocabulary
LENGTHS = (3, 5)  # start, words, end


def networks(masks: bool) -> Networks:
    return make_networks(
        micro_model(),
        attention=dot_product_attention,
        dtype="float32",
        mask_padding_tokens=masks,
    )


def tokens(padding: int) -> jax.Array:
    draw = np.random.default_rng(0).integers
    rows = [[62, *draw(1, 60, n - 2), END, *[padding] * (NUM_TOKENS - n)] for n in LENGTHS]
    return jnp.asarray(rows, jnp.int32)


@pytest.fixture(scope="module")
def params() -> dict[str, dict]:
    plain, key = networks(False), jax.random.key(0)
    return {name: jax.jit(getattr(plain, name).init)(key) for name in ("unet", "text_encoder")}


def predict(params: dict[str, dict], context: jax.Array, *, masks: bool) -> jax.Array:
    draw = np.random.default_rng(1).normal
    noisy = jnp.asarray(draw(size=(len(context), 8, 8, 4)), jnp.float32)
    timesteps = jnp.zeros(len(context), jnp.int32)
    return jax.jit(networks(masks).unet.apply)(params["unet"], noisy, timesteps, context)


@pytest.mark.parametrize("padding", [0, END])  # SD 2 pads with 0, SD 1 with the end itself
def test_padding_is_as_if_it_were_not_there(params: dict[str, dict], padding: int) -> None:
    encoder = params["text_encoder"]
    whole = networks(False).text_encoder.apply(encoder, tokens(padding))
    marked = networks(True).text_encoder.apply(encoder, tokens(padding))
    found = predict(params, marked, masks=True)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(marked[row, :length], whole[row, :length])
        assert not marked[row, length:].any() and whole[row, length:].any()
        alone = jnp.stack([whole[row, :length]] * 2)  # a caption of that length, unpadded
        expected = predict(params, alone, masks=False)[row]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    assert jnp.abs(found - predict(params, whole, masks=False)).max() > 1e-4
    assert jnp.abs(found - predict(params, marked, masks=False)).max() > 1e-4


def test_other_padding_makes_no_difference_and_no_gradient(params: dict[str, dict]) -> None:
    """The text encoder is causal, so that padding reaches the picture through attention alone."""
    encode = networks(True).text_encoder
    one, other = (encode.apply(params["text_encoder"], tokens(padding)) for padding in (0, 7))
    np.testing.assert_array_equal(one, other)

    def total(context: jax.Array) -> jax.Array:
        return jnp.sum(predict(params, context, masks=True) ** 2)

    gradient = jax.jit(jax.grad(total))(one)
    assert jnp.isfinite(gradient).all() and gradient[0, : LENGTHS[0]].any()
    assert not gradient[0, LENGTHS[0] :].any()
