"""No mesh changes the numbers: updates of everything that a step can do, on eight virtual devices
laid out in every way, against one device; and nothing that saves memory changes them either."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np
import pytest

from sdx.config.schema import Config, DataConfig, DataKind, Remat
from sdx.data.loader import HostBatch, make_loader
from sdx.data.source import Example
from sdx.parallel import sharding
from sdx.training.program import ByShape, Program, build
from sdx.training.state import TrainState
from tests.micro import NUM_TOKENS, RESOLUTION, micro_config, micro_mesh

BATCH = 16
RATE = 1e-3  # of the micro-model: what AdamW moves a weight by, whatever its gradient
POINTER_BYTES = 8
ONE = (1, 1, 1)


@dataclass(frozen=True)
class Photos:
    """Images that must be shrunk and cropped; captions aI and bI."""

    fingerprint: str = "photos"

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Example:
        draw = np.random.default_rng(index).integers
        image = draw(0, 256, (RESOLUTION + 5, 2 * RESOLUTION, 3), dtype=np.uint8)
        return Example(image, (f"a{index}", f"b{index}"))


@dataclass(frozen=True)
class Letters:
    """A tokenizer of characters, of which the micro-model knows 64."""

    max_length: int = NUM_TOKENS
    vocab_size: int = 64
    pad_token_id: int = 0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [[ord(letter) % 64 for letter in text.ljust(NUM_TOKENS, "@")] for text in texts]
        return np.asarray(rows, np.int32)


@dataclass(frozen=True)
class Outcome:
    """What two updates from the same start made of the same pictures."""

    program: Program
    state: TrainState
    gradient: Any
    """Of the first update, clipped: a tenth of it is in AdamW's first moment."""
    losses: list[float]
    norms: list[float]


@pytest.fixture(scope="module")
def batches() -> list[HostBatch]:
    """Cropped and flipped at random, half of the captions dropped."""
    data = DataConfig(
        kind=DataKind.shapes, center_crop=False, random_flip=True, caption_dropout=0.5
    )
    loader = make_loader(
        Photos(), Letters(), data, seed=3, global_batch_size=BATCH, resolution=RESOLUTION
    )
    taken = list(islice(loader, 2))
    loader.close()
    return taken


@pytest.fixture(scope="module")
def one(batches: list[HostBatch]) -> Outcome:
    return run(everything(), ONE, batches)


@pytest.fixture(scope="module")
def at_once(batches: list[HostBatch]) -> Outcome:
    return run(everything(gradient_accumulation=1), ONE, batches)


@pytest.mark.parametrize(
    ("shape", "shards_sequence"),
    [
        ((8, 1, 1), False),
        ((2, 4, 1), False),
        ((2, 2, 2), False),
        ((1, 8, 1), False),
        ((1, 1, 8), False),
        ((1, 1, 8), True),
    ],
)
def test_no_mesh_changes_the_numbers(
    shape: tuple[int, int, int], shards_sequence: bool, one: Outcome, batches: list[HostBatch]
) -> None:
    config = everything()
    config.attention.shard_sequence = shards_sequence
    found = run(config, shape, batches)
    assert_equal(found, one)
    assert_lies_on(found, shape)
    assert_donated(found.program)


def test_captions_were_dropped_and_images_cropped(batches: list[HostBatch]) -> None:
    """Or the tests above would show less than they say."""
    dropped = [(host.tokens == 0).all(axis=1) for host in batches]
    assert 4 < np.concatenate(dropped).sum() < 28
    images = batches[0].images
    assert images is not None and images.shape == (BATCH, RESOLUTION, RESOLUTION, 3)


def test_accumulation_equals_the_large_batch(one: Outcome, at_once: Outcome) -> None:
    assert_equal(one, at_once)


@pytest.mark.parametrize("remat", [Remat.dots, Remat.blocks, Remat.full])
def test_what_is_computed_again_is_what_was_computed(
    remat: Remat, at_once: Outcome, batches: list[HostBatch]
) -> None:
    found = run(everything(gradient_accumulation=1, remat=remat), ONE, batches)
    assert_equal(found, at_once)


def everything(**train: Any) -> Config:
    """Accumulation, a trained text encoder with its rate, the average, clipping."""
    options: dict[str, Any] = {
        "global_batch_size": BATCH,
        "gradient_accumulation": 2,
        "text_encoder": True,
        "ema": True,
    }
    config = micro_config(**(options | train))
    config.optimizer.text_encoder_lr = 1e-4
    return config


def run(config: Config, shape: tuple[int, int, int], batches: list[HostBatch]) -> Outcome:
    data, fsdp, tensor = shape
    mesh = micro_mesh(data * fsdp * tensor, data=data, fsdp=fsdp, tensor=tensor)
    with few_optimizations(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST_SHARDED_BYTES", 256)  # the micro-model's are all small
        program = build(config, mesh, max_steps=10).compile()
        frozen = program.place_frozen(**lively(program.abstract_frozen))
        state = program.init(**lively(program.abstract_state.params))
    gradient, losses, norms = None, [], []
    for host in batches:
        batch = program.place_batch(host)
        moments, conditioning = program.encode(frozen, batch)
        state, metrics = program.step(state, moments, conditioning, batch.weights)
        opt_state: Any = state.opt_state
        gradient = gradient or jax.tree.map(lambda x: 10 * np.asarray(x), opt_state.mu)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return Outcome(program, state, gradient, losses, norms)


@contextmanager
def few_optimizations() -> Iterator[None]:
    """What compiles for eight devices in seconds."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def lively(abstract: Any) -> Any:
    """Weights that keep the size of what they are applied to, so that every gradient counts."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        around = 1.0 if len(leaf.shape) == 1 else 0.0  # scales of norms; biases may be anything
        return rng.normal(around, 1 / np.sqrt(fan_in), leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, abstract)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """Losses to 1e-6, gradients to 1e-5, relative; the weights after both updates."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    ours, theirs = (dict(leaves(one.gradient)) for one in (found, expected))
    norm = np.sqrt(sum(np.square(x).sum() for x in theirs.values()))
    far = {
        path: error
        for path, gradient in theirs.items()
        if (error := np.linalg.norm(ours[path] - gradient))
        > 1e-5 * max(np.linalg.norm(gradient), 1e-4 * norm)
    }
    assert far == {}, "gradients differ"
    for tree in ("params", "ema"):
        ours, theirs = (dict(leaves(getattr(one.state, tree))) for one in (found, expected))
        for path, weights in theirs.items():
            np.testing.assert_allclose(ours[path], weights, rtol=0, atol=RATE / 20, err_msg=path)


def leaves(tree: Any) -> list[tuple[str, np.ndarray]]:
    return [
        (sharding.path_name(path), np.asarray(x)) for path, x in jax.tree.leaves_with_path(tree)
    ]


def assert_lies_on(found: Outcome, shape: tuple[int, int, int]) -> None:
    """Weights, average and moments are split as far as the mesh says."""
    _, fsdp, tensor = shape
    opt_state: Any = found.state.opt_state
    trees: list[Any] = [found.state.params, found.state.ema, opt_state.mu, opt_state.nu]
    for tree in trees:
        middle = tree["unet"]["mid_block"]
        block = middle["attentions"]["0"]["transformer_blocks"]["0"]
        layer = tree["text_encoder"]["encoder"]["layers"]["0"]
        for linear in (block["attn1"]["to_q"], layer["self_attn"]["q_proj"], layer["mlp"]["fc2"]):
            kernel = linear["kernel"]
            assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)
        kernel = middle["resnets"]["0"]["conv1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // fsdp


def assert_donated(program: Program) -> None:
    """The next state is written where the last one was: all that is new are the metrics."""
    assert isinstance(program.step, ByShape)
    [step] = program.step.compiled.values()
    memory: Any = step.memory_analysis()
    state = sharding.placement(program.abstract_state).on_device
    assert memory.alias_size_in_bytes == state
    num_arrays = len(jax.tree.leaves(program.abstract_state))
    assert memory.output_size_in_bytes - state < 2 * POINTER_BYTES * num_arrays
