"""Trains the small text encoder of the embedded model on the captions of `data=shapes`.

Every state from the end token on must tell size, colour, shape and background apart by one linear
read-out each, noise notwithstanding: that binds "red" to the shape or to the background before the
UNet sees any of it. Captions that leave attributes out belong to the lesson, so that a shorter
prompt means what it says; held-out combinations do not.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32

from sdx.config.schema import TextEncoderConfig
from sdx.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Attributes, combinations
from sdx.data.tokenizer import Tokenizer
from sdx.models.clip_text import CLIPTextModel
from sdx.models.module import Params, Pure, pure

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
STATE_NOISE = 1.0
"""Deviation of the noise on states; theirs is about 1 after the final LayerNorm."""
WHOLE_CAPTIONS = 0.6
"""Share of captions that name every attribute."""
VALUES = {
    "size": list(SIZES),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "background": list(BACKGROUNDS),
}


def make_network(config: TextEncoderConfig) -> Pure:
    """The text encoder in float32."""
    return pure(
        lambda rngs: CLIPTextModel(
            config,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            precision=jax.lax.Precision.DEFAULT,
            rngs=rngs,
        )
    )


def train_text_encoder(
    config: TextEncoderConfig,
    tokenizer: Tokenizer,
    *,
    num_steps: int,
    seed: int,
    say: Callable[[str], None],
) -> Params:
    """Parameters of a text encoder whose states name the attributes of a caption."""
    network = make_network(config)
    root = jax.random.key(seed)
    params = {
        "text": jax.jit(network.init)(jax.random.fold_in(root, num_steps)),
        # One more value each: the caption does not say.
        "heads": {n: jnp.zeros((config.hidden_size, len(v) + 1)) for n, v in VALUES.items()},
    }
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, num_steps // 10, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(
        params: Params, opt_state: optax.OptState, batch: dict[str, Array], key: Array
    ) -> tuple[Params, optax.OptState, tuple[Array, Array]]:
        gradients, errors = jax.grad(_loss, argnums=1, has_aux=True)(network, params, batch, key)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, errors

    begin = time.monotonic()
    for i in range(num_steps):
        batch = _draw_batch(tokenizer, np.random.default_rng((seed, i)))
        params, opt_state, errors = step(params, opt_state, batch, jax.random.fold_in(root, i))
        if i % 100 == 99 or i == num_steps - 1:
            loss, right = np.asarray(errors)
            say(
                f"text encoder {i + 1}/{num_steps}: loss {loss:.4f}, attributes right {right:.3f}, "
                f"{time.monotonic() - begin:.0f} s"
            )
    return params["text"]


def describe(attributes: Attributes, rng: np.random.Generator) -> tuple[str, dict[str, int]]:
    """A caption of some of `attributes`, and the class of each: its place in `VALUES`, or one past
    the end where the caption does not say."""
    words = {name: getattr(attributes, name) for name in VALUES}
    if rng.random() > WHOLE_CAPTIONS:
        words = {name: word for name, word in words.items() if rng.random() < 0.5}
    subject = " ".join(words[name] for name in ("size", "colour", "shape") if name in words)
    parts = [f"a {subject}"] if subject else []
    if "background" in words:
        parts.append(f"a {words['background']} background")
    classes = {n: v.index(words[n]) if n in words else len(v) for n, v in VALUES.items()}
    return " on ".join(parts), classes


def _draw_batch(
    tokenizer: Tokenizer, rng: np.random.Generator
) -> dict[str, Int32[np.ndarray, "..."]]:
    shown = combinations("train")
    drawn = [describe(shown[rng.integers(len(shown))], rng) for _ in range(BATCH_SIZE)]
    classes = {name: np.array([c[name] for _, c in drawn], np.int32) for name in VALUES}
    return classes | {"tokens": tokenizer.encode([caption for caption, _ in drawn])}


def _loss(
    network: Pure, params: Params, batch: dict[str, Int[Array, "..."]], key: Array
) -> tuple[Array, Float[Array, "2"]]:
    """Cross-entropy of every attribute at every place from the end token on."""
    tokens = batch["tokens"]
    states = network.apply(params["text"], tokens)
    states = states + STATE_NOISE * jax.random.normal(key, states.shape)
    is_end = (tokens == tokens[:, -1:]).astype(jnp.float32)  # the end token pads, too
    losses, rights = [], []
    for name, head in params["heads"].items():
        logits = states @ head
        classes = jnp.broadcast_to(batch[name][:, None], tokens.shape)
        losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, classes))
        rights.append((jnp.argmax(logits, -1) == classes).astype(jnp.float32))
    loss, right = (
        jnp.sum(sum(x) * is_end) / jnp.sum(is_end) / len(VALUES) for x in (losses, rights)
    )
    return loss, jnp.stack([loss, right])
