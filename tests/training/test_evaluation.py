"""The validation loss is a number of the weights and the examples, whatever measures it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdx.config.schema import Cache, Config, TimestepBias, TimestepBiasConfig
from sdx.data.loader import HostBatch, Loader, make_loader
from sdx.data.source import BadImageError, DataError, Example
from sdx.training import evaluation
from sdx.training.evaluation import (
    NOISE_SEED,
    Evaluator,
    ValidationLoss,
    bucket_of,
    check_buckets,
    evaluation_data,
    fixed_timesteps,
    make_evaluator,
    num_measured,
)
from sdx.training.program import Program
from tests.micro import RESOLUTION, micro_config
from tests.training.test_meshes import few_optimizations
from tests.training.test_program import BATCH, frozen, make, random_networks

LENGTH, BAD, BUCKETS = 21, 5, 4  # two batches of 8 and a part of a third


@dataclass(frozen=True)
class Pictures:
    """Noise pictures wider than high; one cannot be read, each has a second caption."""

    length: int = LENGTH
    fingerprint: str = "pictures"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        if index == BAD:
            raise BadImageError("missing", "no such file", f"{index}.png")
        pixels = np.random.default_rng(index).integers(0, 256, (RESOLUTION, 20, 3), dtype=np.uint8)
        return Example(pixels, (f"caption {index}", "another"))


class Letters:
    """A tokenizer of code points; the first eight count."""

    max_length, vocab_size, pad_token_id = 8, 64, 0

    def encode(self, texts: Any) -> np.ndarray:
        rows = [[ord(letter) % 64 for letter in f"{text[-8:]:8}"] for text in texts]
        return np.asarray(rows, np.int32)


def evaluator_of(config: Config, program: Program, **changes: Any) -> Evaluator:
    data = evaluation_data(config.data, "validation")
    chosen: dict[str, Any] = {"num_examples": LENGTH, "num_buckets": BUCKETS}
    return make_evaluator(
        program,
        frozen(program),
        Pictures(),
        Letters(),
        replace(data, max_bad_fraction=0.2),
        resolution=RESOLUTION,
        **chosen | changes,
    )


def measure(
    config: Config | None = None, num_devices: int = 1, axes: dict[str, int] | None = None
) -> ValidationLoss:
    config = config or config_of()
    program = make(config, num_devices, **axes or {})
    return said(evaluator_of(config, program)(weights(program)))


def config_of(**train: Any) -> Config:
    return micro_config(global_batch_size=BATCH, **train)


def weights(program: Program) -> Any:
    return program.init(**random_networks(program, program.abstract_state.params)).params


def said(loss: ValidationLoss | None) -> ValidationLoss:
    assert loss is not None
    return loss


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled() -> Iterator[None]:
    """Compiling is the cost of these tests, and this is the same mathematics unoptimised."""
    with few_optimizations():
        yield


@pytest.fixture(scope="module")
def reference() -> ValidationLoss:
    return measure()


def assert_same(ours: ValidationLoss, expected: ValidationLoss) -> None:
    assert ours.num_examples == expected.num_examples == LENGTH - 1
    assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
    assert ours.by_bucket == pytest.approx(expected.by_bucket, rel=1e-6)


def test_it_is_the_plain_loss_of_each_example_in_a_loop(reference: ValidationLoss) -> None:
    config = config_of()
    program, errors, timesteps = make(config), [], []
    networks, params = program.networks, weights(program)["unet"]
    still = frozen(program)
    schedule = program.rule.objective.schedule
    unet, vae = jax.jit(networks.unet.apply), jax.jit(partial(networks.vae.apply, method="encode"))
    text_encoder = jax.jit(networks.text_encoder.apply)
    for index in range(LENGTH):
        if index == BAD:
            continue
        example = Pictures()[index]
        pixels = example.pixels[None, :, 2:-2].astype(np.float32) / 127.5 - 1
        tokens = jnp.asarray(Letters().encode(example.captions[:1]))
        moments = vae(still["vae"], jnp.asarray(pixels))
        latents = np.asarray(moments)[..., : moments.shape[-1] // 2] * program.rule.scaling_factor
        key = jax.random.fold_in(jax.random.key(NOISE_SEED), index)
        noise = np.asarray(jax.random.normal(key, latents.shape[1:]))[None]
        timestep = int(((index * 0x9E3779B9 + 2**31) % 2**32) / 2**32 * 1000)
        signal = np.sqrt(schedule.alphas_cumprod[timestep])
        sigma = np.sqrt(1 - schedule.alphas_cumprod[timestep])
        context = text_encoder(still["text_encoder"], tokens)
        noisy = jnp.asarray(signal * latents + sigma * noise)
        output = unet(params, noisy, jnp.asarray([timestep], jnp.int32), context)
        errors.append(np.mean((np.asarray(output) - (signal * noise - sigma * latents)) ** 2))
        timesteps.append(timestep)
    quarters = [
        np.mean([e for e, t in zip(errors, timesteps, strict=True) if t // 250 == k])
        for k in range(BUCKETS)
    ]
    assert reference.loss == pytest.approx(np.mean(errors, dtype=np.float64), rel=1e-5)
    assert reference.by_bucket == pytest.approx(quarters, rel=1e-5)
    assert list(reference.row()) == ["validation_loss"] + [f"validation_loss_{k}" for k in range(4)]


@pytest.mark.parametrize(
    ("num_devices", "axes"), [(2, {}), (8, {"data": 2, "fsdp": 2, "tensor": 2})], ids=["2", "8"]
)
def test_devices_do_not_change_it(
    reference: ValidationLoss, num_devices: int, axes: dict[str, int]
) -> None:
    assert_same(measure(num_devices=num_devices, axes=axes), reference)


@pytest.mark.parametrize("unroll", [True, False])
def test_accumulation_does_not_change_it(reference: ValidationLoss, unroll: bool) -> None:
    config = config_of(gradient_accumulation=4)
    program = make(config)
    program = replace(program, rule=replace(program.rule, unroll=unroll))
    assert_same(said(evaluator_of(config, program)(weights(program))), reference)


def test_neither_does_what_training_makes_of_its_loss_and_its_data(
    reference: ValidationLoss,
) -> None:
    config = config_of()
    config.diffusion = replace(
        config.diffusion,
        snr_gamma=5.0,
        noise_offset=0.1,
        input_perturbation=0.1,
        timestep_bias=TimestepBiasConfig(strategy=TimestepBias.later, multiplier=9.0),
    )
    config.run.seed = 3
    random = {"center_crop": False, "random_flip": True, "caption_dropout": 0.9}
    config.data = replace(config.data, cache=Cache.moments, **random)
    program = make(config).compile()  # trains from moments, measures from pixels
    assert_same(said(evaluator_of(config, program)(weights(program))), reference)


def test_neither_do_hosts_nor_the_order_of_their_rows(
    reference: ValidationLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hosts(Loader):
        """The rows of two hosts, the second's first."""

        def __init__(self, *args: Any, **kwargs: Any):
            half = len(kwargs["rows"]) // 2
            halves = kwargs["rows"][half:], kwargs["rows"][:half]
            self.hosts = [make_loader(*args, **kwargs | {"rows": rows}) for rows in halves]
            self.bad_images: dict[int, Any] = {}

        def __next__(self) -> HostBatch:
            one, two = (next(host) for host in self.hosts)
            rows = ("images", "tokens", "weights", "indices", "epochs")
            joined = {
                name: np.concatenate([getattr(one, name), getattr(two, name)]) for name in rows
            }
            first = [f"caption {i}" if i != BAD else "" for i in joined["indices"]]
            np.testing.assert_array_equal(joined["tokens"], Letters().encode(first))
            return replace(one, **joined)

        def close(self) -> None:
            for host in self.hosts:
                host.close()

    monkeypatch.setattr(evaluation, "make_loader", Hosts)
    assert_same(measure(), reference)


def test_a_trained_text_encoder_is_measured_as_trained(reference: ValidationLoss) -> None:
    config = config_of(text_encoder=True)
    program = make(config)
    params = weights(program)
    evaluator = evaluator_of(config, program)
    before = said(evaluator(params))
    changed = params | {"text_encoder": jax.tree.map(lambda x: x * 0.5, params["text_encoder"])}
    assert said(evaluator(changed)).loss != before.loss
    assert_same(before, reference)


def test_a_stop_ends_it_within_a_batch_and_the_first_examples_are_a_part() -> None:
    config = config_of()
    program = make(config)
    whole, asked = evaluator_of(config, program), []
    evaluator = replace(whole, num_examples=BATCH)

    def should_stop() -> bool:
        asked.append(0)
        return len(asked) > 1

    assert whole(weights(program), should_stop) is None and len(asked) == 2
    part = said(evaluator(weights(program)))
    assert part.num_examples == BATCH - 1 and [*evaluator.bad_images] == [BAD]
    assert num_measured(Pictures(), 1, BATCH) == BATCH and num_measured(Pictures(), 9, 8) == LENGTH
    assert num_measured(Pictures(), None, BATCH) == LENGTH


@pytest.mark.fast
def test_timesteps_fill_the_schedule_and_stay_with_their_example() -> None:
    for length in (100, 1000, 20_000):
        counts = np.bincount(bucket_of(fixed_timesteps(np.arange(length), 1000), 1000, 10))
        assert len(counts) == 10 and np.abs(counts - length / 10).max() <= 3
    even = fixed_timesteps(np.arange(0, 2000, 2), 1000)
    assert np.abs(np.bincount(bucket_of(even, 1000, 10)) - 100).max() <= 3
    np.testing.assert_array_equal(
        fixed_timesteps(np.arange(50), 1000)[7:], fixed_timesteps(np.arange(7, 50), 1000)
    )
    big = fixed_timesteps(np.asarray([2**40 + 1, 10**12]), 1000)
    assert big.min() >= 0 and big.max() < 1000


@pytest.mark.fast
def test_a_part_of_the_schedule_that_nothing_measures_is_refused() -> None:
    check_buckets(64, 1000, 10)
    with pytest.raises(DataError, match=r"eval.num_buckets=10: the 6 examples .* use 5 or fewer"):
        check_buckets(6, 1000, 10)
