"""What `sdx.encode` does: a source's images and captions into a cache, once, with all devices.

Every process encodes shards of its own (its index modulo their number) over its own devices, so
that none waits for another; the first one writes the index when all are there. A shard that is
whole is never made again, so a start after a kill goes on where the last one stopped.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh

from sdx.config import resolve
from sdx.config.errors import ConfigError
from sdx.config.schema import Cache, Config, Init
from sdx.data.cache.records import (
    FORMAT,
    CacheIndex,
    CacheKey,
    Layout,
    Shard,
    read_index,
    read_shard,
    size_text,
)
from sdx.data.cache.rows import CachedMoments, Records
from sdx.data.cache.shards import forget_shards, sound_shards
from sdx.data.cache.staging import local_cache
from sdx.data.loader import check_bad_images
from sdx.data.source import BadImage, BadImageError, DataError, Source, first_examples
from sdx.data.sources.open import open_source
from sdx.data.tokenizer import Tokenizer
from sdx.experiment.adopt import adopt
from sdx.experiment.caching import cache_folder, context_key, moments_key, num_views
from sdx.experiment.compilation_cache import heal_compilation_cache, use_compilation_cache
from sdx.experiment.encoding.encoder import image_encoder, local_mesh, token_encoder
from sdx.experiment.encoding.writing import Interrupted, write_context, write_moments
from sdx.experiment.hosts import check_same_facts, check_same_folder, only_first_speaks
from sdx.experiment.setup import REFUSALS, check_weights, open_tokenizer, open_weights
from sdx.parallel.agreement import (
    from_first,
    is_first,
    is_marked_by_all,
    leave_to_first,
    mark,
    process_count,
    process_index,
)
from sdx.parallel.distributed import start_processes
from sdx.parallel.failures import Companions, Failure
from sdx.parallel.mesh import claim_devices, make_mesh
from sdx.parallel.place import ProcessesError
from sdx.parallel.stopping import EXIT_INTERRUPTED, StopFlag
from sdx.record.files import DamagedRecord, now, write_json
from sdx.record.lock import RunLock, RunLocked
from sdx.record.provenance import git_commit
from sdx.record.store import AnyPath, StoreError
from sdx.training.metrics import ProgressLine, format_seconds
from sdx.weights.model_files import ModelFiles

FINISHED, FAILED, REFUSED = 0, 1, 2

_PIXELS_AT_ONCE = 2**21  # on a device: 8 images of 512 pixels, whose activations take about 1 GB
_MAX_AT_ONCE = 64  # images or captions on a device
_FIRST_RATE_S = 2.0  # the rate of less time is none
_LOOK_EVERY_S = 2.0  # for what other processes have finished


class EncodingFailed(RuntimeError):
    """The cache could not be made whole; what is there stays."""


@dataclass(frozen=True)
class Job:
    """One cache to make, and what it is made of."""

    config: Config
    mesh: Mesh
    """This process's devices."""
    source: Source
    tokenizer: Tokenizer
    weights: ModelFiles
    key: CacheKey
    """Of the moments."""
    folder: AnyPath
    """Of all caches."""


@dataclass(frozen=True)
class Target:
    """One folder of shards on its way to become a cache."""

    key: CacheKey
    folder: AnyPath
    num_examples: int
    num_views: int
    num_shards: int
    shape: tuple[int, ...]

    @property
    def own(self) -> range:
        """The shards of this process."""
        return range(process_index(), self.num_shards, process_count())


def encode(config: Config, overrides: Sequence[str]) -> int:
    """Makes the cache that training with `config` reads, or what is missing of it; returns the exit
    code.
    """

    def on_exit() -> None:
        print("interrupted; the same command goes on from here")

    def on_failure(failure: Failure) -> None:
        if failure.exit_code == EXIT_INTERRUPTED:
            return on_exit()
        print(failure.trace, failure.said, sep="", file=sys.stderr)

    with StopFlag(on_exit) as stop:
        try:
            with stop.compiling():  # others may take minutes to come
                companions = start_processes(config.distributed, config.hardware, on_failure)
                stop.join(companions, in_step=False)
        except ProcessesError as error:
            print(f"sdx: {error}", file=sys.stderr)
            return REFUSED
        with companions, only_first_speaks():
            return _started(config, overrides, stop, companions)


def _started(
    config: Config, overrides: Sequence[str], stop: StopFlag, companions: Companions
) -> int:
    """All but how processes begin and end."""
    try:
        with stop.compiling():  # scanning a folder of images can take minutes
            check_same_folder(cache_folder(config), "data.cache_dir")
            job = prepare(config)
            examples = f"{len(job.source)} examples, fingerprint {job.source.fingerprint}"
            check_same_facts({"data": examples, "the cache": job.key.name})
        with _locked(job.folder / job.key.name):
            return _attempt(job, overrides, stop)
    except EncodingFailed as error:
        return companions.fail(FAILED, f"sdx: {error}")
    except RunLocked as error:
        leave_to_first(error)
        reason = str(error).removesuffix(", or use another run.name.")
        return companions.fail(REFUSED, f"sdx: the same cache is being made: {reason}.")
    except (ConfigError, StoreError, *REFUSALS) as error:
        leave_to_first(error)
        reason = str(error) if isinstance(error, ConfigError) else f"sdx: {error}"
        return companions.fail(REFUSED, reason)


def _attempt(job: Job, overrides: Sequence[str], stop: StopFlag) -> int:
    try:
        _make_all(job, overrides, stop)
    except Interrupted:
        print(f"interrupted by {stop.signal_name}; the same command goes on from here")
        return EXIT_INTERRUPTED
    except (DataError, OSError) as error:
        raise EncodingFailed(str(error)) from error
    return FINISHED


def prepare(config: Config) -> Job:
    """Looks at devices, data and weights, of which the UNet's are not needed; raises one of
    `REFUSALS` with what is wrong.
    """
    use_compilation_cache(config.run.compilation_cache_dir)
    claim_devices(config.hardware)
    mesh = make_mesh(config.mesh, config.hardware)
    model = config.model
    if not model.from_files:
        model = replace(model, init=Init.random, unet_checkpoint=None)
    weights, unet = open_weights(model)
    if model.from_files:
        config = adopt(config, weights, unet)
    check_weights(config, weights, None)
    source = open_source(config.data, resolution=resolve.resolution(config))
    if config.train.max_samples is not None:
        source = first_examples(source, config.train.max_samples)
    return Job(
        config=config,
        mesh=local_mesh(mesh),
        source=source,
        tokenizer=open_tokenizer(config, weights),
        weights=weights,
        key=moments_key(config, source, weights),
        folder=cache_folder(config),
    )


def _make_all(job: Job, overrides: Sequence[str], stop: StopFlag) -> None:
    kind, start = job.config.data.cache, time.monotonic()
    moments = _moments_target(job)
    targets = [moments]
    _make_moments(job, moments, overrides, stop)
    if kind is Cache.moments_and_context:
        targets.append(_context_target(job, moments))
        _make_context(job, targets[1], moments, overrides, stop)
    took = format_seconds(time.monotonic() - start)
    folders = " and ".join(str(target.folder) for target in targets)
    print(f"complete and verified after {took}: {folders}")
    print(f"train from it: the same overrides to python -m sdx.train with data.cache={kind.name}")


def _moments_target(job: Job) -> Target:
    model, layout = job.config.model, Layout(len(job.source))
    latent = resolve.resolution(job.config) // resolve.vae_factor(job.config)
    return Target(
        key=job.key,
        folder=job.folder / job.key.name,
        num_examples=layout.num_examples,
        num_views=num_views(job.config),
        num_shards=layout.num_shards,
        shape=(latent, latent, 2 * model.vae.latent_channels),
    )


def _context_target(job: Job, moments: Target) -> Target:
    """The empty caption has a shard of its own, the last."""
    text_encoder = job.config.model.text_encoder
    key = context_key(job.config, job.key, job.weights)
    return replace(
        moments,
        key=key,
        folder=job.folder / key.name,
        num_views=1,
        num_shards=moments.num_shards + 1,
        shape=(text_encoder.max_position_embeddings, text_encoder.hidden_size),
    )


def _make_moments(job: Job, target: Target, overrides: Sequence[str], stop: StopFlag) -> None:
    config = job.config
    pending = _pending(
        job, target, overrides, stop, lambda _, shard: _is_repaired(job.source, shard)
    )
    if pending:
        layout, devices = Layout(target.num_examples), job.mesh.size
        num_todo = sum(len(layout.examples(shard)) for shard in pending)
        _announce(job, target, num_todo)
        examples_at_once = max(1, _images_at_once(config) * devices // target.num_views)
        num_images = -(-examples_at_once * target.num_views // devices) * devices
        with stop.compiling(), heal_compilation_cache(config.run.compilation_cache_dir):
            images = image_encoder(config, job.mesh, job.weights, num_images)
        progress = _Progress(num_todo, "images")
        write_moments(
            job.source,
            job.tokenizer,
            config,
            folder=target.folder,
            digest=target.key.digest,
            pending=pending,
            num_views=target.num_views,
            encode_images=images,
            examples_at_once=examples_at_once,
            num_images=num_images,
            progress=progress.show,
            should_stop=lambda: stop.requested,
        )
        progress.close()
    _conclude(config, target, stop)


def _make_context(
    job: Job, target: Target, moments: Target, overrides: Sequence[str], stop: StopFlag
) -> None:
    bad = _bad_by_shard(moments)
    pending = _pending(
        job, target, overrides, stop, lambda number, shard: shard.bad_images != bad[number]
    )
    if pending:
        records = Records(local_cache(moments.folder), moments.key.digest)
        num_todo = sum(
            len(records.layout.examples(shard)) for shard in pending if shard < moments.num_shards
        )
        print(f"text states of {num_todo} examples' captions -> {target.folder}", flush=True)
        num_rows = _MAX_AT_ONCE * job.mesh.size
        with stop.compiling(), heal_compilation_cache(job.config.run.compilation_cache_dir):
            tokens = token_encoder(job.config, job.mesh, job.weights, num_rows)
        progress = _Progress(num_todo, "examples")
        write_context(
            CachedMoments(records),
            job.tokenizer,
            folder=target.folder,
            digest=target.key.digest,
            pending=pending,
            bad_images=bad,
            encode_tokens=tokens,
            num_rows=num_rows,
            progress=progress.show,
            should_stop=lambda: stop.requested,
        )
        progress.close()
    _conclude(job.config, target, stop)


def _bad_by_shard(moments: Target) -> list[Mapping[int, BadImage]]:
    """What each shard of the moments has no captions of; the empty caption's shard lacks nothing.

    A shard of states lies as its shard of moments does, so it goes by that one's.
    """
    index = read_index(moments.folder)
    assert index is not None, "they are made first"
    return [*(shard.bad_images for shard in index.shards), {}]


def _pending(
    job: Job,
    target: Target,
    overrides: Sequence[str],
    stop: StopFlag,
    is_outdated: Callable[[int, Shard], bool],
) -> list[int]:
    """This process's shards that are not there, or not whole, or outdated."""
    target.folder.mkdir(parents=True, exist_ok=True)
    if is_first() and not (target.folder / "meta.json").is_file():
        made = {"at": now(), "overrides": [*overrides], "git_commit": git_commit()}
        meta = {"format": FORMAT, "kind": target.key.kind, "key": dict(target.key.parts)}
        write_json(target.folder / "meta.json", {**meta, "made": made})
    sound = sound_shards(target.folder, target.own, should_stop=lambda: stop.requested)
    if stop.requested:
        raise Interrupted
    again = {number for number, shard in sound.items() if is_outdated(number, shard)}
    if kept := len(sound.keys() - again):
        print(f"{kept} of {len(target.own)} files are there and whole", flush=True)
    pending = [number for number in target.own if number not in sound or number in again]
    if process_count() > 1:  # others must not take what is there for what will be
        forget_shards(target.folder, pending)
        mark(target.key.name)
    return pending


def _is_repaired(source: Source, shard: Shard) -> bool:
    """Whether an image that could not be read when the shard was written can be read today."""
    for index in shard.bad_images:
        try:
            source[index]
        except BadImageError:
            continue
        return True
    return False


def _announce(job: Job, target: Target, num_todo: int) -> None:
    """Says what is about to be written, and refuses to begin where the disk has no room for it."""
    height, width, channels = target.shape
    tokens = 4 * job.config.model.text_encoder.max_position_embeddings
    per_example = target.num_views * (2 * height * width * channels + tokens + 64)
    views = f", {target.num_views} views of each" if target.num_views > 1 else ""
    print(
        f"encoding {num_todo} of {target.num_examples} images{views}, about"
        f" {size_text(num_todo * per_example)} ({size_text(per_example)} each) -> {target.folder}",
        flush=True,
    )
    if isinstance(target.folder, Path):
        free = shutil.disk_usage(target.folder).free
        if free < num_todo * per_example:
            raise DataError(
                f"data.cache_dir: {size_text(free)} are free in {target.folder.parent}; make"
                " room, or give another folder."
            )


def _images_at_once(config: Config) -> int:
    """On one device."""
    return min(_MAX_AT_ONCE, max(1, _PIXELS_AT_ONCE // resolve.resolution(config) ** 2))


def _conclude(config: Config, target: Target, stop: StopFlag) -> None:
    """Returns when every process's shards are there and the index says so."""
    shards = _all_shards(target, stop)
    bad = {index: image for shard in shards.values() for index, image in shard.bad_images.items()}
    check_bad_images(
        bad.values(), target.num_examples, config.data.max_bad_fraction, "while encoding"
    )
    index = CacheIndex(
        target.num_examples,
        target.num_views,
        target.shape,
        tuple(shards[number] for number in range(target.num_shards)),
    )
    if is_first():
        if _index_there(target.folder) != index:
            write_json(target.folder / "index.json", index.to_json())
        return
    while _index_there(target.folder) != index:
        _look_again(stop)


def _index_there(folder: AnyPath) -> CacheIndex | None:
    """The index in `folder`; None where none is, or what is there is none."""
    try:
        return read_index(folder)
    except DamagedRecord:
        return None


def _all_shards(target: Target, stop: StopFlag) -> Mapping[int, Shard]:
    """Every shard by number, when all processes have judged theirs and all are there."""
    while not is_marked_by_all(target.key.name):
        _look_again(stop)
    found: dict[int, Shard] = {}
    while True:
        for number in range(target.num_shards):
            if number not in found and (shard := read_shard(target.folder, number)) is not None:
                found[number] = shard
        if len(found) == target.num_shards:
            return found
        _look_again(stop)


def _look_again(stop: StopFlag) -> None:
    if stop.requested:
        raise Interrupted
    time.sleep(_LOOK_EVERY_S)


@contextmanager
def _locked(folder: AnyPath) -> Iterator[None]:
    """The folder for this command alone: its first process holds the lock for all."""
    lock = RunLock(folder / "lock.json")

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()

    from_first(take, (RunLocked,))
    try:
        yield
    finally:
        lock.release()


class _Progress:
    """How far this process is; the clock starts with the first example, when all is compiled."""

    def __init__(self, total: int, unit: str):
        self._line = ProgressLine(total)
        self._total = total
        self._unit = unit
        self._start: float | None = None

    def show(self, done: int) -> None:
        """Examples done, their rate and the time left."""
        if self._start is None:
            self._start = time.monotonic()
        took = time.monotonic() - self._start
        if took < _FIRST_RATE_S and done < self._total:
            return
        rate = max(done - 1, 1) / max(took, 1e-9)
        left = format_seconds((self._total - done) / rate)
        text = f"{done}/{self._total} {self._unit}  {rate:.1f} {self._unit}/s  {left} left"
        self._line.write(text, is_last=done == self._total)

    def close(self) -> None:
        self._line.close()
