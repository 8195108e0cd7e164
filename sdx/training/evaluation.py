"""Validation loss: the UNet's error on held-out examples, each with a noise and a timestep of its
own that never change.

The number is a function of the weights, the examples and the model's own target: neither of seed,
step or attempt, nor of the batch, the mesh, the hosts or accumulation, up to rounding. So it
compares two runs on the same data as well as two steps of one.

- An example's noise comes from a fixed key and its index, its timestep from its index alone: the
  multiples of the golden ratio fill the schedule evenly however many examples there are (Weyl's
  sequence), so each part of it is measured by its share of them.
- Latents are the mean of the VAE's posterior; nothing is sampled.
- The loss is the plain mean squared error of what the model predicts, whatever training does to its
  own: no Min-SNR weights, biased timesteps, noise offset, input perturbation or DREAM.
- Pictures are cropped in the centre and not mirrored; the first caption counts and none is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, Int64

from sdx.config.schema import Cache, DataConfig
from sdx.data.loader import HostBatch, Loader, make_loader
from sdx.data.source import BadImage, DataError, Example, Source
from sdx.data.tokenizer import Tokenizer
from sdx.parallel import sharding
from sdx.training.program import Batch, ByShape, Program
from sdx.training.state import Params
from sdx.training.step import Conditioning, StepRule, split_batch

# The runs' own keys begin with their seed and take a second number for each use.
NOISE_SEED = 20_407
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, odd, so that its multiples modulo 2^32 do not repeat
_HALF = 1 << 31


@dataclass(frozen=True)
class ValidationLoss:
    """The mean over all examples, and over those of each equal part of the noise schedule; part 0
    is nearly clean."""

    loss: float
    by_bucket: tuple[float, ...]
    num_examples: int

    def row(self) -> dict[str, float]:
        """As metrics: `validation_loss`, `validation_loss_0` and so on."""
        buckets = {f"validation_loss_{k}": loss for k, loss in enumerate(self.by_bucket)}
        return {"validation_loss": self.loss} | buckets


def fixed_timesteps(
    indices: Int64[np.ndarray, " n"], num_timesteps: int
) -> Int32[np.ndarray, " n"]:
    """The timestep that each example is measured at."""
    places = (indices.astype(np.uint64) * _GOLDEN + _HALF) % 2**32
    return (places * num_timesteps >> 32).astype(np.int32)


def bucket_of(
    timesteps: Int32[np.ndarray, " n"], num_timesteps: int, num_buckets: int
) -> Int64[np.ndarray, " n"]:
    """Which of the equal parts of the schedule each timestep lies in."""
    return timesteps.astype(np.int64) * num_buckets // num_timesteps


def num_measured(source: Source, num_batches: int | None, global_batch_size: int) -> int:
    """Examples that `eval.num_batches` global batches of `source` hold."""
    length = len(source)
    return length if num_batches is None else min(length, num_batches * global_batch_size)


def check_buckets(num_examples: int, num_timesteps: int, num_buckets: int) -> None:
    """Raises DataError where some part of the schedule would be measured by no example."""

    def counts(buckets: int) -> Int64[np.ndarray, " k"]:
        return np.bincount(bucket_of(timesteps, num_timesteps, buckets), minlength=buckets)

    timesteps = fixed_timesteps(np.arange(num_examples), num_timesteps)
    if counts(num_buckets).all():
        return
    most = next(k for k in range(num_buckets - 1, 0, -1) if counts(k).all())
    raise DataError(
        f"eval.num_buckets={num_buckets}: the {num_examples} examples measured do not reach all of"
        f" them; use {most} or fewer, or measure more examples (eval.split, eval.num_batches)."
    )


def evaluation_data(data: DataConfig, split: str) -> DataConfig:
    """How the examples of `split` are read to be measured: nothing about them is random."""
    return replace(
        data,
        split=split,
        center_crop=True,
        random_flip=False,
        caption_dropout=0.0,
        shuffle=False,
        buckets=False,
        cache=Cache.none,
        num_workers=0,
    )


@dataclass(frozen=True)
class Evaluator:
    """Measures the validation loss of weights that lie as `program` trains them; `make_evaluator`
    makes it."""

    program: Program
    frozen: Params
    source: Source
    tokenizer: Tokenizer
    data: DataConfig
    resolution: int
    num_examples: int
    num_buckets: int
    encode: ByShape
    """As the program's, for pixels whatever training reads."""
    measure: Compiled
    """(params, moments, conditioning, indices, timesteps, weights) to losses, indices and weights
    of the batch, whole on every device; `params` are the weights or their average."""
    bad_images: dict[int, BadImage] = field(default_factory=dict)
    """Found unreadable while measuring, by index; they count nothing."""

    @property
    def of(self) -> str:
        """Names the examples: only losses of the same ones are compared."""
        return f"{self.source.fingerprint}[:{self.num_examples}]"

    def __call__(
        self, params: Params, should_stop: Callable[[], bool] = lambda: False
    ) -> ValidationLoss | None:
        """The loss of `params` (`{"unet": ...}` and what else is trained); None where
        `should_stop()` was true before its end."""
        size, measured = self.program.global_batch_size, []
        pending: tuple[Array, ...] | None = None
        with self._loader() as loader:
            for _ in range(-(-self.num_examples // size)):
                if should_stop():
                    return None
                outputs = self._dispatch(params, next(loader))
                if pending is not None:  # one batch ahead of the device, and no more
                    measured.append(jax.device_get(pending))
                pending = outputs
            measured.append(jax.device_get(pending))
            self.bad_images.update(loader.bad_images)
        losses, indices, weights = (np.concatenate(part) for part in zip(*measured, strict=True))
        return self._summary(losses, indices, weights)

    def _loader(self) -> Loader:
        return make_loader(
            FirstCaptions(self.source),
            self.tokenizer,
            self.data,
            seed=0,
            global_batch_size=self.program.global_batch_size,
            resolution=self.resolution,
            rows=self.program.host_rows,
        )

    def _dispatch(self, params: Params, host: HostBatch) -> tuple[Array, ...]:
        """Losses, indices and weights of a global batch, on every host; rows behind the end of the
        source have weight 0."""
        program = self.program
        indices = host.indices.astype(np.int32)
        timesteps = fixed_timesteps(host.indices, self._num_timesteps)
        weights = np.where(host.epochs == 0, host.weights, np.float32(0))
        batch = program.place_batch(replace(host, weights=weights))
        moments, conditioning = self.encode(self.frozen, batch)
        rows = (program.place_rows(indices), program.place_rows(timesteps), batch.weights)
        return self.measure(params, moments, conditioning, *rows)

    @property
    def _num_timesteps(self) -> int:
        return self.program.rule.objective.schedule.num_timesteps

    def _summary(
        self,
        losses: Float32[np.ndarray, " n"],
        indices: Int32[np.ndarray, " n"],
        weights: Float32[np.ndarray, " n"],
    ) -> ValidationLoss:
        """Means in float64, summed in the order of the examples."""
        counted = np.flatnonzero(weights)
        order = counted[np.argsort(indices[counted])]
        losses, indices = losses[order].astype(np.float64), indices[order].astype(np.int64)
        timesteps = fixed_timesteps(indices, self._num_timesteps)
        buckets = bucket_of(timesteps, self._num_timesteps, self.num_buckets)
        by_bucket = [_mean(losses[buckets == bucket]) for bucket in range(self.num_buckets)]
        return ValidationLoss(_mean(losses), tuple(by_bucket), len(losses))


def make_evaluator(
    program: Program,
    frozen: Params,
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    resolution: int,
    num_examples: int,
    num_buckets: int,
) -> Evaluator:
    """An evaluator of the first `num_examples` of `source`, compiled; `data` is as
    `evaluation_data` makes it."""
    batch = program.abstract_batch
    place, rows = sharding.batch_sharding(program.mesh), program.global_batch_size
    side = resolution
    images: Any = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8, sharding=place)
    pixels = Batch(images, batch.tokens, batch.weights)
    known = program.encode if isinstance(program.encode, ByShape) else ByShape(program.encode, {})
    encode = known.knowing(program.abstract_frozen, pixels)
    return Evaluator(
        program,
        frozen,
        source,
        tokenizer,
        data,
        resolution=resolution,
        num_examples=num_examples,
        num_buckets=num_buckets,
        encode=encode,
        measure=_compile_measure(program, encode, pixels),
    )


class FirstCaptions:
    """A source whose examples have their first caption alone."""

    def __init__(self, source: Source):
        self._source = source
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Example:
        example = self._source[index]
        return replace(example, captions=example.captions[:1])


def _compile_measure(program: Program, encode: ByShape, pixels: Batch) -> Compiled:
    place = sharding.batch_sharding(program.mesh)

    def rows(like: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, dtype or like.dtype, sharding=place)

    def measure(
        params: Params,
        moments: Array,
        conditioning: Array,
        indices: Array,
        timesteps: Array,
        weights: Array,
    ) -> tuple[Array, Array, Array]:
        losses = example_losses(program.rule, params, moments, conditioning, indices, timesteps)
        return losses, indices, weights

    encoded = jax.eval_shape(encode.function, program.abstract_frozen, pixels)
    numbers = rows(pixels.weights, jnp.int32)
    measured = jax.jit(measure, out_shardings=sharding.replicated(program.mesh))
    lowered = measured.lower(
        program.abstract_state.params, *map(rows, encoded), numbers, numbers, pixels.weights
    )
    return lowered.compile()


def example_losses(
    rule: StepRule,
    params: Params,
    moments: Float[Array, "b h w m"],
    conditioning: Conditioning,
    indices: Int[Array, " b"],
    timesteps: Int[Array, " b"],
) -> Float[Array, " b"]:
    """Mean squared error of each example; float32. In the pieces that training takes of a batch, so
    that it needs no more memory."""
    rows = (moments, conditioning, indices, timesteps)
    if rule.gradient_accumulation == 1:
        return _losses(rule, params, rows)
    count = rule.gradient_accumulation
    pieces = jax.tree.map(partial(split_batch, num_pieces=count), rows)
    if rule.unroll:
        parts = [
            _losses(rule, params, jax.tree.map(lambda x, i=i: x[i], pieces)) for i in range(count)
        ]
        losses = jnp.stack(parts)
    else:
        losses = jax.lax.map(partial(_losses, rule, params), pieces)
    return losses.T.reshape(-1)


def _losses(rule: StepRule, params: Params, rows: tuple[Any, ...]) -> Float[Array, " b"]:
    moments, conditioning, indices, timesteps = rows
    mean, _ = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    latents = mean * rule.scaling_factor
    noise = jax.vmap(partial(_noise, shape=latents.shape[1:]))(indices)
    noisy = rule.objective.schedule.add_noise(latents, noise, timesteps)
    prediction = rule.predict(params, noisy, timesteps, conditioning).astype(jnp.float32)
    target = rule.objective.target(latents, noise, timesteps)
    return jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))


def _noise(index: Int[Array, ""], shape: tuple[int, ...]) -> Float[Array, "h w c"]:
    return jax.random.normal(jax.random.fold_in(jax.random.key(NOISE_SEED), index), shape)


def _mean(losses: Float64[np.ndarray, " n"]) -> float:
    return float(losses.mean()) if len(losses) else float("nan")
