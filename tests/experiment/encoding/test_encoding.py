"""A cache against the pixels it was made of, and what kills and strangers do to its making."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdx.config.compose import compose
from sdx.config.schema import Cache, Config
from sdx.data.cache import staging
from sdx.data.cache.records import CacheKey, read_index, records_name
from sdx.data.cache.rows import CachedSource
from sdx.data.cache.shards import ShardWriter, forget_shards
from sdx.data.loader import HostBatch, make_loader
from sdx.data.source import BadImageError, DataError, Example
from sdx.data.sources.checked import CheckedSource
from sdx.experiment import run
from sdx.experiment.caching import training_source
from sdx.experiment.encoding import encoding, writing
from sdx.experiment.encoding.encoder import image_encoder, local_mesh, token_encoder
from sdx.experiment.encoding.encoding import encode, prepare
from sdx.parallel.mesh import make_mesh
from sdx.parallel.stopping import StopFlag
from sdx.record.files import DamagedRecord
from sdx.record.lock import RunLock
from sdx.record.store import as_path

NUM_IMAGES = 34
NUM_SHARDS = 12  # of three
BAD = 6  # found out only when it is encoded
HALF = 2.0**-11  # what rounding to float16 changes, relative


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures, wider than high, with one to three captions."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for i in range(NUM_IMAGES):
        y, x = np.mgrid[0 : 40 + i, 0:80] / 80
        waves = [np.sin(7 * x + i), np.cos(5 * y * (1 + i % 7)), np.sin(9 * x * y)]
        Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1))).save(folder / f"{i}.png")
        captions = [f"picture {i}", f"waves number {i}", f"the {i}"][: 1 + i % 3]
        rows.append(json.dumps({"file_name": f"{i}.png", "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def lose_one(patch: pytest.MonkeyPatch) -> None:
    """An image that was found good is gone when it is read for training."""
    read = CheckedSource.__getitem__

    def but_one(source: CheckedSource, index: int, /) -> Example:
        if index == BAD:
            raise BadImageError("missing", "no such file", f"{index}.png")
        return read(source, index)

    patch.setattr(CheckedSource, "__getitem__", but_one)


@pytest.fixture
def one_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_one(monkeypatch)


def overrides_of(photos: Path, caches: Path | str) -> list[str]:
    return [
        "data=imagefolder",
        f"data.dir={photos}",
        f"data.cache_dir={caches}",
        "data.random_flip=true",
        "data.center_crop=false",
        "data.cache_views=2",
        "data.caption_dropout=0.3",
        "data.max_bad_fraction=0.2",
        "data.resolution=32",
        "train.per_device_batch_size=4",
        f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
    ]


def configured(photos: Path, caches: Path | str, *overrides: str) -> Config:
    """Moments and text states."""
    kind = "data.cache=moments_and_context"
    return compose([*overrides_of(photos, caches), kind, *overrides])


@pytest.fixture(scope="module")
def caches(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the moments and the text states of the pictures."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        lose_one(patch)
        assert encode(configured(photos, folder), []) == 0
    return folder


def batches(config: Config, count: int) -> list[HostBatch]:
    """The first batches that training would read."""
    job = prepare(config)
    source = training_source(config, job.source, job.weights)
    assert isinstance(source, CachedSource) is (config.data.cache is not Cache.none)
    assert source.fingerprint == job.source.fingerprint
    with make_loader(
        source,
        job.tokenizer,
        config.data,
        seed=config.run.seed,
        global_batch_size=4,
        resolution=32,
    ) as loader:
        return list(islice(loader, count))


def online(config: Config) -> Config:
    """The same training from pixels."""
    data = replace(config.data, cache=Cache.none, cache_views=None)
    return replace(config, data=data)


@pytest.mark.usefixtures("one_is_bad")
def test_rows_are_those_of_the_pixels(photos: Path, caches: Path) -> None:
    """Two epochs of two views, over the border between them: the same places, captions, dropped
    captions and bad images; moments and states to the rounding of float16."""
    config = configured(photos, caches)
    weights = prepare(config).weights
    mesh = local_mesh(make_mesh(config.mesh, config.hardware))
    images = image_encoder(config, mesh, weights, 4)
    states = token_encoder(config, mesh, weights, 4)
    empty = prepare(config).tokenizer.encode([""])[0]
    num_empty = 0
    for cached, pixels in zip(batches(config, 12), batches(online(config), 12), strict=True):
        for name in ("indices", "epochs", "weights", "tokens"):
            np.testing.assert_array_equal(getattr(cached, name), getattr(pixels, name), name)
        assert cached.bad_images == pixels.bad_images
        good = pixels.weights == 1
        assert cached.images is None and cached.moments is not None and cached.context is not None
        assert pixels.images is not None and pixels.moments is None
        moments = np.asarray(images(pixels.images))[good]
        np.testing.assert_allclose(cached.moments[good], moments, rtol=2 * HALF, atol=2e-4)
        assert np.std(moments, axis=(1, 2)).min() > 10 * 2e-4  # not all alike to that tolerance
        np.testing.assert_allclose(
            cached.context, np.asarray(states(pixels.tokens)), rtol=2 * HALF, atol=2e-3
        )
        assert not cached.moments[~good].any()
        num_empty += int((pixels.tokens[good] == empty).all(axis=1).sum())
    assert num_empty > 0


def test_later_epochs_take_the_views_in_turn(photos: Path, caches: Path) -> None:
    config = configured(photos, caches, "data.shuffle=false", "data.caption_dropout=0")
    config = replace(config, data=replace(config.data, num_workers=1))  # rows are picklable
    seen: dict[tuple[int, int], bytes] = {}
    for batch in batches(config, 4 * NUM_IMAGES // 4):
        assert batch.moments is not None
        for row, (epoch, index) in enumerate(zip(batch.epochs, batch.indices, strict=True)):
            seen[int(epoch), int(index)] = batch.moments[row].tobytes()
    different = [i for i in range(NUM_IMAGES) if seen[0, i] != seen[1, i]]
    assert len(different) > NUM_IMAGES // 2  # few crops fit into the narrow ones
    assert all(seen[0, i] == seen[2, i] and seen[1, i] == seen[3, i] for i in range(NUM_IMAGES))


@pytest.mark.usefixtures("one_is_bad")
def test_training_from_a_cache_has_the_losses_of_the_pixels(
    photos: Path, caches: Path, tmp_path: Path
) -> None:
    """At a rate that moves nothing, so that a difference is not amplified from step to step."""
    losses: dict[str, list[float]] = {}
    config = configured(
        photos,
        caches,
        "model.unet.block_out_channels=[16]",
        "model.unet.down_block_types=[CrossAttnDownBlock2D]",
        "model.unet.attention_head_dim=[1]",
        "model.unet.layers_per_block=1",
        "model.unet.norm_num_groups=4",
        "optimizer.lr=1e-12",
        "lr_schedule=constant",
        "train.max_steps=5",
        "train.per_device_batch_size=8",
        "metrics.every=1",
        "sample.every=null",
        "checkpoint.every=null",
        "export.at_end=false",
        f"run.output_dir={tmp_path}",
    )
    for name, each in {"cached": config, "online": online(config)}.items():
        named = replace(each, run=replace(each.run, name=name))
        assert run.run(named, []) == 0
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert len({*losses["online"]}) == 5
    np.testing.assert_allclose(losses["cached"], losses["online"], rtol=2e-4)


@pytest.mark.usefixtures("one_is_bad")
def test_a_second_start_makes_nothing_anew(
    photos: Path, caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in caches.glob("*/*.*")}
    assert encode(configured(photos, caches), []) == 0
    assert before == {path: path.stat().st_mtime_ns for path in caches.glob("*/*.*")}
    assert f"{NUM_SHARDS} of {NUM_SHARDS} files are there and whole" in capsys.readouterr().out


def moments_alone(photos: Path, caches: Path, *overrides: str) -> Config:
    config = configured(photos, caches, *overrides)
    return replace(config, data=replace(config.data, cache=Cache.moments))


def contents(caches: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in caches.glob("moments-*/*.arrayrecord")}


KILLED_AT_THE_SHARD = """
import os, signal, sys
from sdx import encode
from sdx.data.cache import shards

write_json, calls = shards.write_json, []

def dying(path, value):
    calls.append(path)
    if len(calls) > int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, value)

shards.write_json = dying
sys.exit(encode.main(sys.argv[2:]))
"""


def test_what_was_killed_goes_on_to_the_same_cache(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a shard and its description, ended by SIGTERM, finished: as if at once."""
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert encode(moments_alone(photos, reference), []) == 0
    overrides = [*overrides_of(photos, killed), "data.cache=moments"]
    script = [sys.executable, "-c", KILLED_AT_THE_SHARD, "3", *overrides]
    died = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    [folder] = killed.iterdir()
    assert sorted(path.name for path in folder.glob("0*.json")) == [
        f"{number:05d}.json" for number in range(3)
    ]
    assert (folder / records_name(3)).is_file() and read_index(folder) is None
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("0000[012].*")}

    show = encoding._Progress.show

    def stopping(progress: encoding._Progress, done: int) -> None:
        show(progress, done)
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)

    config = moments_alone(photos, killed)
    with monkeypatch.context() as patch:
        patch.setattr(encoding._Progress, "show", stopping)
        patch.setattr(encoding, "_MAX_AT_ONCE", 2)
        assert encode(config, []) == 75
    assert read_index(folder) is None and not [*folder.glob(".*.tmp")]
    assert encode(config, []) == 0
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert contents(killed) == contents(reference)
    assert read_index(folder) == read_index(reference / folder.name)


def test_damaged_and_repaired_shards_are_made_anew(
    photos: Path, caches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit, a torn index, a torn description, and the image that could not be read before
    and can today."""
    copy = tmp_path / "copy"
    shutil.copytree(caches, copy)
    [folder] = copy.glob("moments-*")
    damaged = folder / records_name(1)
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    (folder / "index.json").write_text('{"shards": []}')
    with pytest.raises(DamagedRecord, match="no index of a cache .*run python -m sdx.encode"):
        batches(moments_alone(photos, copy), 1)
    (folder / "00004.json").write_text("{")
    assert encode(moments_alone(photos, copy), []) == 0
    assert f"{NUM_SHARDS - 3} of {NUM_SHARDS} files are there" in capsys.readouterr().out
    assert damaged.read_bytes() == whole
    index = read_index(folder)
    assert index is not None and index.bad_images == {}
    [before] = caches.glob("moments-*")
    assert (read_index(before) or index).bad_images[BAD].reason == "missing"
    # the states of that shard's captions lie elsewhere, so they are made anew
    assert encode(configured(photos, copy), []) == 0
    for cached, pixels in zip(
        batches(configured(photos, copy), 9),
        batches(online(configured(photos, copy)), 9),
        strict=True,
    ):
        np.testing.assert_array_equal(cached.tokens, pixels.tokens)
        assert cached.weights.all()


def test_shards_of_other_processes_count_once_those_have_judged_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process finds its shard of an earlier start outdated, later than the first one
    is through with its own."""

    def write(number: int, *records: bytes) -> None:
        shard = ShardWriter(tmp_path, number)
        for record in records:
            shard.add(record)
        shard.finish({})

    write(0, b"a")
    write(1, b"of before")
    looks = iter(
        [
            lambda: forget_shards(tmp_path, [1]),
            lambda: judged.append(1),
            lambda: write(1, b"b", b"c"),
        ]
    )
    judged = [0]
    monkeypatch.setattr(encoding, "is_marked_by_all", lambda event: len(judged) == 2)
    monkeypatch.setattr(encoding, "_look_again", lambda stop: next(looks)())
    target = encoding.Target(CacheKey("moments", {}), tmp_path, 4, 1, 2, (1,))
    found = encoding._all_shards(target, StopFlag(lambda: None))
    assert [found[number].records for number in (0, 1)] == [1, 2]
    assert next(looks, None) is None


def test_two_at_once_and_too_many_bad_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = moments_alone(photos, tmp_path)
    folder = tmp_path / prepare(config).key.name
    folder.mkdir()
    with RunLock(folder / "lock.json"):
        assert encode(config, []) == 2
    assert "the same cache is being made" in capsys.readouterr().err
    lose_one(monkeypatch)
    assert encode(moments_alone(photos, tmp_path, "data.max_bad_fraction=0.02"), []) == 1
    assert f"1 of {NUM_IMAGES} images became unreadable while encoding" in capsys.readouterr().err
    assert read_index(folder) is None


def test_states_that_float16_cannot_hold_are_no_cache() -> None:
    rows = iter([writing._CaptionRow(0, 0, np.zeros(3, np.int32))])
    states = jnp.full((4, 3, 2), jnp.inf, jnp.float16)
    with pytest.raises(DataError, match="caption 0 of example 0 are not finite"):
        list(writing._states(rows, lambda tokens: states, 4))


def test_a_stale_cache_is_named_with_what_differs(photos: Path, caches: Path) -> None:
    for override, difference in {
        "data.resolution=64": "resolution 32 ≠ 64",
        "run.seed=1": "seed of the views 0 ≠ 1",
        "data.interpolation=box": "interpolation lanczos ≠ box",
        "data.cache_views=3": "views 2 ≠ 3",
        "model.activations_dtype=bfloat16": "computed in float32 ≠ bfloat16",
    }.items():
        with pytest.raises(DataError, match=f"differs in {difference}; run python -m sdx.encode"):
            batches(configured(photos, caches, override), 1)


def test_a_cache_in_a_store_is_copied_to_be_read(
    photos: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded into s3://, gone on with, copied once, and compared with its digests on the way."""
    reference, copies = tmp_path / "reference", tmp_path / "copies"
    monkeypatch.setattr(staging, "STAGED", copies)
    config = configured(photos, f"{bucket}/caches")
    assert encode(moments_alone(photos, reference), []) == 0
    assert encode(config, []) == 0
    place = as_path(f"{bucket}/caches")
    folder = next(place.glob("moments-*"))
    (folder / "index.json").unlink()
    (folder / "00002.json").unlink()
    assert encode(config, []) == 0  # what is missing is made, the rest kept
    stored = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".arrayrecord"}
    assert stored == contents(reference)
    shutil.rmtree(copies)
    [batch] = batches(config, 1)
    assert batch.moments is not None and batch.context is not None
    copied = {path: path.stat().st_mtime_ns for path in copies.glob("*/*.arrayrecord")}
    assert len(copied) == len(stored) + NUM_SHARDS + 1
    batches(config, 1)
    assert copied == {path: path.stat().st_mtime_ns for path in copied}

    [file] = copies.glob("moments-*/00003.arrayrecord")
    file.unlink()
    content = bytearray((folder / file.name).read_bytes())
    content[100] ^= 1
    (folder / file.name).write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"s3://.*00003\.arrayrecord: damaged, its digest"):
        batches(config, 1)
    assert not file.exists() and not [*copies.glob("*/.*.tmp")]


ONE_OF_TWO = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
assert jax.device_count() == 2 and jax.local_device_count() == 1
from sdx import encode
sys.exit(encode.main(sys.argv[3:]))
"""


def test_two_processes_share_the_work(photos: Path, tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert encode(configured(photos, alone), []) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    kind = "data.cache=moments_and_context"
    overrides = [*overrides_of(photos, together), kind, "hardware.num_devices=2", "mesh=dp"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, port, str(rank), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(said)
    assert "18 of 34 images" in said[0] and said[1] == ""  # the other 16, and it keeps quiet
    for name in ("moments", "context"):
        [ours], [theirs] = together.glob(f"{name}-*"), alone.glob(f"{name}-*")
        assert ours.name == theirs.name  # the same key, and the same sizes of all files
        sizes = [
            [(shard.records, shard.num_bytes) for shard in index.shards]
            for index in (read_index(ours), read_index(theirs))
            if index is not None
        ]
        assert sizes[0] == sizes[1]
