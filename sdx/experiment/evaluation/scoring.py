"""Pictures through the networks that score them: read once, prepared by threads, in equal batches.

The networks come from local files; none is bundled and nothing is downloaded.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from sdx.data.images import decode
from sdx.data.pictures import Picture
from sdx.data.source import BadImage, BadImageError, DataError, count_reasons
from sdx.data.tokenizer import Tokenizer, load_tokenizer
from sdx.models.clip_vision import CLIPModel
from sdx.models.inception import NUM_FEATURES, Inception
from sdx.models.layers import Numerics
from sdx.models.module import Params, Pure, pure
from sdx.parallel import sharding
from sdx.scores.clip_score import clip_scores, read_preparation
from sdx.scores.frechet import FeatureSums
from sdx.scores.inception_input import inception_input
from sdx.weights.clip import load_clip, read_clip_config
from sdx.weights.errors import WeightsError
from sdx.weights.inception import load_inception
from sdx.weights.tensor_files import read_json

MAX_PIXELS = 200_000_000  # of one picture; beyond is taken for an attack
# Whole float32 products on every device, so that numbers of two machines agree.
NUMERICS = Numerics(jnp.float32, jnp.float32, jax.lax.Precision.HIGHEST)
_FEATURES_AT_ONCE = 1024  # a covariance costs the same for one picture as for so many
_SAY_EVERY_S = 20.0
_NUM_THREADS = min(16, os.cpu_count() or 1)

Say = Callable[[str], None]
Prepare = Callable[[Image.Image], np.ndarray]


@dataclass(frozen=True)
class Extractor:
    """What a network makes of pictures, or of texts: a batch of fixed size on all devices."""

    function: Callable[..., jax.Array]
    params: Params
    mesh: Mesh
    batch_size: int

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """A row for each of at most `batch_size` inputs."""
        count = len(inputs)
        padded = np.concatenate([inputs, np.repeat(inputs[-1:], self.batch_size - count, axis=0)])
        rows = jax.device_put(padded, sharding.batch_sharding(self.mesh))
        return np.asarray(self.function(self.params, rows))[:count]


class FidNetwork:
    """FID's Inception and how it is shown pictures."""

    prepare: Prepare = staticmethod(inception_input)

    def __init__(self, weights: Path, mesh: Mesh, batch_size: int):
        network = pure(lambda rngs: Inception(numerics=NUMERICS, rngs=rngs))
        params = load_inception(weights, _abstract(network, mesh))
        self._features = _extractor(network, params, "__call__", mesh, batch_size)
        self.start()

    def start(self) -> None:
        """Begins another set of pictures."""
        self.sums = FeatureSums(NUM_FEATURES)
        self._waiting: list[np.ndarray] = []

    def add(self, inputs: np.ndarray, captions: Sequence[str | None]) -> None:
        """Takes a batch of prepared pictures in."""
        self._waiting.append(self._features(inputs))
        if sum(map(len, self._waiting)) >= _FEATURES_AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Takes what is left into the sums."""
        if self._waiting:
            self.sums.add(np.concatenate(self._waiting))
            self._waiting = []


class ClipNetwork:
    """CLIP, and the scores of pictures with their captions."""

    def __init__(self, folder: Path, mesh: Mesh, batch_size: int):
        config = read_clip_config(folder)
        preprocessor = folder / "preprocessor_config.json"
        wanted = read_json(preprocessor) if preprocessor.is_file() else {}
        self.prepare: Prepare = read_preparation(
            wanted, config.vision.image_size, str(preprocessor)
        )
        self._tokenizer: Tokenizer = load_tokenizer(
            folder,
            max_length=config.text.max_position_embeddings,
            num_embeddings=config.text.vocab_size,
        )
        network = pure(lambda rngs: CLIPModel(config, numerics=NUMERICS, rngs=rngs))
        params = load_clip(folder, _abstract(network, mesh))
        make = partial(_extractor, network, params, mesh=mesh, batch_size=batch_size)
        self._images, self._texts = make("encode_images"), make("encode_texts")
        self.scores: list[float] = []

    def add(self, inputs: np.ndarray, captions: Sequence[str | None]) -> None:
        """Scores a batch of prepared pictures; WeightsError where a score is not finite."""
        tokens = self._tokenizer.encode([caption or "" for caption in captions])
        scores = clip_scores(self._images(inputs), self._texts(tokens))
        if not np.isfinite(scores).all():
            raise WeightsError(
                "CLIP score: features are not finite; the weights given as --clip are damaged."
            )
        self.scores += scores.tolist()

    def finish(self) -> None:
        """All is scored."""


def show(
    networks: Sequence[FidNetwork | ClipNetwork],
    pictures: Sequence[Picture],
    batch_size: int,
    *,
    say: Say,
) -> list[BadImage]:
    """Every picture through every network; those that cannot be read are left out and returned.

    Raises DataError where none can be read.
    """
    bad: list[BadImage] = []
    seen, last_said = 0, time.monotonic()
    prepares = [network.prepare for network in networks]
    for batch in _read_ahead(pictures, prepares, batch_size):
        good = [(picture, rows) for picture, rows in batch if not isinstance(rows, BadImage)]
        bad += [rows for _, rows in batch if isinstance(rows, BadImage)]
        captions = [picture.caption for picture, _ in good]
        for index, network in enumerate(networks):
            if good:
                network.add(np.stack([rows[index] for _, rows in good]), captions)
        seen += len(batch)
        if time.monotonic() - last_said > _SAY_EVERY_S:
            say(f"{seen} of {len(pictures)} pictures seen")
            last_said = time.monotonic()
    for network in networks:
        network.finish()
    if len(bad) == len(pictures):
        raise DataError(
            f"{bad[0].path}: none of {len(pictures)} pictures can be read "
            f"({count_reasons(bad)}); give JPEG, PNG or WEBP files that open in a viewer.",
            bad,
        )
    if bad:
        say(f"left out {len(bad)} pictures that cannot be read: {count_reasons(bad)}")
    return bad


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pictures_digest(pictures: Sequence[Picture]) -> str:
    """SHA-256 over the bytes of every picture and its caption, in their order."""
    total = hashlib.sha256()
    for picture in pictures:
        total.update(f"{digest(picture.path)} {picture.caption}\n".encode())
    return total.hexdigest()


Rows = list[np.ndarray] | BadImage


def _read_ahead(
    pictures: Sequence[Picture], prepares: Sequence[Prepare], batch_size: int
) -> Iterator[list[tuple[Picture, Rows]]]:
    """Batches in order; the next one is read while one is looked at."""
    batches = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="sdx-read") as threads:

        def begin(batch: Sequence[Picture]) -> list[Future[Rows]]:
            return [threads.submit(_prepared, picture.path, prepares) for picture in batch]

        coming = begin(batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            ready, coming = coming, begin(following)
            yield [(picture, rows.result()) for picture, rows in zip(batch, ready, strict=True)]


def _prepared(path: Path, prepares: Sequence[Prepare]) -> Rows:
    try:
        image = decode(path, max_pixels=MAX_PIXELS)
    except BadImageError as error:
        return BadImage(str(path), error.reason, error.detail)
    return [prepare(image) for prepare in prepares]


def _extractor(
    network: Pure, params: Params, method: str, mesh: Mesh, batch_size: int
) -> Extractor:
    function = jax.jit(
        partial(network.apply, method=method), out_shardings=sharding.replicated(mesh)
    )
    return Extractor(function, params, mesh, batch_size)


def _abstract(network: Pure, mesh: Mesh) -> Params:
    place = sharding.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        network.abstract(),
    )
