"""What a cache's files promise: whole or not there, never another's, never damaged in silence."""

import pickle
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdx.data.cache import shards
from sdx.data.cache.records import (
    MAX_SHARD_EXAMPLES,
    MAX_SHARDS,
    CacheIndex,
    CacheKey,
    Layout,
    MomentsRecord,
    find_cache,
    pack_context,
    read_index,
    read_shard,
    records_name,
    unpack_context,
)
from sdx.data.cache.rows import CachedContext, CachedMoments, Records
from sdx.data.cache.shards import ShardWriter, finishing, forget_shards, sound_shards
from sdx.data.source import BadImage, DataError
from sdx.record.files import write_json

pytestmark = pytest.mark.fast

KEY = CacheKey("moments", {"examples": "abc", "resolution": 64, "random_flip": False})
NUM_EXAMPLES = 46  # 3 in each of 16 shards, one in the last
BAD = {4: BadImage("4.png", "truncated", "ends early")}


def record(index: int, view: int = 0) -> MomentsRecord:
    rng = np.random.default_rng([index, view])
    return MomentsRecord(
        index,
        view,
        rng.normal(size=(2, 3, 8)).astype(np.float16),
        rng.integers(0, 99, (1 + index % 3, 5), dtype=np.int32),
        first_context=index % 7,
    )


def write(folder: Path, number: int, digest: bytes = KEY.digest, num_views: int = 1) -> None:
    shard = ShardWriter(folder, number)
    examples = Layout(NUM_EXAMPLES).examples(number)
    for index in examples:
        for view in range(num_views):
            shard.add(record(index, view).pack(digest))
    shard.finish({index: image for index, image in BAD.items() if index in examples})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole cache of two views."""
    folder = tmp_path / KEY.name
    folder.mkdir()
    layout = Layout(NUM_EXAMPLES)
    for number in range(layout.num_shards):
        write(folder, number, num_views=2)
    found = [read_shard(folder, number) for number in range(layout.num_shards)]
    index = CacheIndex(NUM_EXAMPLES, 2, (2, 3, 8), tuple(shard for shard in found if shard))
    write_json(folder / "meta.json", {"format": 1, "kind": "moments", "key": dict(KEY.parts)})
    write_json(folder / "index.json", index.to_json())
    return folder


@pytest.mark.parametrize("num_examples", [1, 2, 15, 16, 17, 833, 10**6, 10**8 + 1])
def test_every_example_lies_in_one_shard(num_examples: int) -> None:
    layout = Layout(num_examples)
    ends = [layout.examples(shard) for shard in (0, layout.num_shards - 1)]
    assert ends[0].start == 0 and ends[1].stop == num_examples and len(ends[1]) > 0
    assert len(ends[0]) == min(layout.shard_examples, num_examples)
    assert 1 <= layout.num_shards <= MAX_SHARDS
    assert layout.shard_examples <= max(MAX_SHARD_EXAMPLES, num_examples // MAX_SHARDS + 1)


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    moments = CachedMoments(Records(folder, KEY.digest))
    for index in (0, 2, 3, 45):
        for epoch in range(4):
            got, expected = moments.read(index, epoch), record(index, epoch % 2)
            assert (got.index, got.view, got.first_context) == (index, epoch % 2, index % 7)
            np.testing.assert_array_equal(got.moments, expected.moments)
            np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert moments.records.bad_images == BAD
    again: CachedMoments = pickle.loads(pickle.dumps(moments))  # as a loader process gets it
    np.testing.assert_array_equal(again.read(7, 1).moments, record(7, 1).moments)


def test_states_are_of_one_caption() -> None:
    states = np.arange(12, dtype=np.float16).reshape(4, 3)
    packed = pack_context(KEY.digest, 5, 1, states)
    got = unpack_context(packed, digest=KEY.digest, index=5, caption=1)
    np.testing.assert_array_equal(got, states)
    with pytest.raises(ValueError, match="holds caption 1 of example 5"):
        unpack_context(packed, digest=KEY.digest, index=5, caption=0)


def damage_each(folder: Path) -> Iterator[str]:
    """Damages the file of example 3's shard in one way after the other."""
    file = folder / records_name(1)
    whole = file.read_bytes()
    place = whole.index(record(3).moments.tobytes())
    for at in (place, place + 90):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        file.write_bytes(flipped)
        yield f"bit at {at}"
    file.write_bytes(whole[:-1] + b"")
    yield "cut"
    file.unlink()
    yield "gone"
    file.write_bytes((folder / records_name(2)).read_bytes())
    yield "of other examples"
    file.write_bytes(whole)


def test_damage_is_an_error_that_names_the_file(folder: Path) -> None:
    for what in damage_each(folder):
        with pytest.raises(DataError, match=r"00001\.arrayrecord: damaged .* makes it anew"):
            CachedMoments(Records(folder, KEY.digest)).read(3, 0)
            pytest.fail(what)
    CachedMoments(Records(folder, KEY.digest)).read(3, 0)


def test_records_of_another_cache_are_not_read(folder: Path) -> None:
    other = replace(KEY, parts={**KEY.parts, "resolution": 32})
    with pytest.raises(DataError, match=r"damaged \(holds view 0 of example 3"):
        CachedMoments(Records(folder, other.digest)).read(3, 0)
    with pytest.raises(DataError, match="damaged"):
        CachedContext(Records(folder, KEY.digest)).read(3, 0, 0)


def test_only_whole_shards_are_kept(folder: Path) -> None:
    def sound(*numbers: int) -> set[int]:
        return {*sound_shards(folder, numbers, should_stop=lambda: False)}

    assert sound(0, 1, 2) == {0, 1, 2}
    for _ in damage_each(folder):
        assert sound(0, 1, 2) == {0, 2}
    (folder / "00000.json").unlink()
    assert sound(0, 1, 2) == {1, 2}
    (folder / ".00001.ab12.tmp").write_bytes(b"half")  # of a killed process
    (folder / ".00002.ab12.tmp").write_bytes(b"half")  # of another process, at work
    assert sound(1) == {1}
    assert [path.name for path in folder.glob(".*.tmp")] == [".00002.ab12.tmp"]
    assert sound_shards(folder, [1], should_stop=lambda: True) == {}


def test_a_forgotten_shard_is_made_again_though_its_records_lie_there(tmp_path: Path) -> None:
    for number in range(2):
        shard = ShardWriter(tmp_path, number)
        shard.add(b"one")
        shard.finish({})
    forget_shards(tmp_path, [1, 2])
    assert {*sound_shards(tmp_path, range(3), should_stop=lambda: False)} == {0}
    assert read_shard(tmp_path, 1) is None and (tmp_path / records_name(1)).is_file()


def test_a_shard_counts_only_when_it_is_finished(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, 0)
    shard.add(b"one")
    assert not (tmp_path / records_name(0)).exists() and read_shard(tmp_path, 0) is None
    shard.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_not_all_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = ShardWriter(tmp_path, 0)
    shard.add(b"one")
    monkeypatch.setattr(shards, "_count_records", lambda file: 0)
    with pytest.raises(OSError, match="disk full"), finishing() as finisher:
        finisher.finish(shard, {})
    assert read_shard(tmp_path, 0) is None


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    shard = ShardWriter(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"\.00000\..*File too large.*is the disk full\?"):
            for _ in range(200):
                shard.add(bytes(1000))
            shard.finish({})
        shard.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_cache_is_told_by_what_differs(folder: Path) -> None:
    place = folder.parent
    assert find_cache(place, KEY) == folder
    wanted = replace(KEY, parts={"examples": "abc", "resolution": 32, "random_flip": True})
    with pytest.raises(DataError) as caught:
        find_cache(place, wanted)
    assert str(caught.value) == (
        f"data.cache: {place} holds no cache of this; the nearest, {KEY.name}, differs in"
        " resolution 64 ≠ 32, random_flip false ≠ true; run python -m sdx.encode with the same"
        " overrides."
    )
    fewer = {"examples": "abc", "resolution": 64}  # as padding, named only where it is marked
    with pytest.raises(DataError, match="differs in random_flip false ≠ null; run"):
        find_cache(place, replace(KEY, parts=fewer))
    with pytest.raises(DataError, match="holds no cache of context; run python -m sdx.encode"):
        find_cache(place, replace(KEY, kind="context"))
    (folder / "index.json").unlink()
    assert read_index(folder) is None
    with pytest.raises(DataError, match="is not finished; run python -m sdx.encode .* to go on"):
        find_cache(place, KEY)
    with pytest.raises(DataError, match="holds no finished cache"):
        Records(folder, KEY.digest)
