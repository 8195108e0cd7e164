"""Batches are functions of (seed, step): across epochs, hosts, workers and resumes."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdx.config.schema import DataConfig, DataKind
from sdx.data.loader import HostBatch, Loader, make_loader
from sdx.data.shapes import ShapesSource
from sdx.data.source import BadImageError, DataError, Example, Source
from sdx.data.sources.open import open_source

SIDE = 8
DATA = DataConfig(kind=DataKind.shapes, num_examples=10, max_bad_fraction=0.2)


@dataclass(frozen=True)
class Letters:
    """A tokenizer of code points, zero-padded to four."""

    max_length: int = 4
    vocab_size: int = 128
    pad_token_id: int = 0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [[*map(ord, text[:4])] + [0] * (4 - len(text[:4])) for text in texts]
        return np.asarray(rows, np.int32).reshape(len(rows), 4)


@dataclass(frozen=True)
class Numbered:
    """Image i is of the gray level i, wider than high, with a dark left edge; captions are aI and
    bI.
    """

    length: int = 10
    bad: frozenset[int] = frozenset()
    fault: str = ""
    fingerprint: str = "numbered"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise BadImageError("missing", "no such file", f"{index}.png")
        if self.fault:
            raise RuntimeError(self.fault)
        image = np.full((SIDE, SIDE * 2, 3), index + 1, np.uint8)
        image[:, 0] = 0
        return Example(image, (f"a{index}", f"b{index}"))


def loader(
    source: Source | None = None,
    data: DataConfig = DATA,
    *,
    seed: int = 3,
    batch: int = 4,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Loader:
    return make_loader(
        source or Numbered(),
        Letters(),
        data,
        seed=seed,
        global_batch_size=batch,
        resolution=SIDE,
        start_step=start,
        rows=rows,
    )


def take(count: int, *arguments: Any, **options: Any) -> list[HostBatch]:
    with loader(*arguments, **options) as batches:
        return list(islice(batches, count))


def pixels(batch: HostBatch) -> np.ndarray:
    assert batch.images is not None
    return batch.images


def indices(batches: list[HostBatch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices]


def assert_equal(first: list[HostBatch], second: list[HostBatch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.step == other.step and one.bad_images == other.bad_images
        for name in ("images", "tokens", "weights", "indices", "epochs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


LIVELY = replace(DATA, center_crop=False, random_flip=True, caption_dropout=0.3)


@pytest.mark.fast
def test_a_batch_holds_what_its_indices_say():
    for batch in take(5):
        assert pixels(batch).dtype == np.uint8 and pixels(batch).shape == (4, SIDE, SIDE, 3)
        assert batch.tokens.dtype == np.int32 and batch.weights.dtype == np.float32
        assert batch.indices.dtype == batch.epochs.dtype == np.int64
        assert batch.weights.tolist() == [1, 1, 1, 1]
        np.testing.assert_array_equal(pixels(batch)[:, 4, 4, 0], batch.indices + 1)
        assert set(map(chr, batch.tokens[:, 0])) <= {"a", "b"}
        assert [chr(n) for n in batch.tokens[:, 1]] == [str(i) for i in batch.indices]


@pytest.mark.fast
def test_each_epoch_holds_each_example_once_across_batches():
    """Batches of 4 over 10 examples: the third batch holds the end of one epoch and more."""
    batches = take(10)
    assert [batch.step for batch in batches] == list(range(10))
    order = indices(batches)
    assert [epoch for batch in batches for epoch in batch.epochs] == sorted([*range(4)] * 10)
    orders = [tuple(order[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in orders)
    assert len(set(orders)) == 4


@pytest.mark.fast
def test_a_batch_may_be_larger_than_the_data():
    (batch,) = take(1, Numbered(3), batch=10)
    assert batch.epochs.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert sorted(batch.indices[:3]) == sorted(batch.indices[3:6]) == [0, 1, 2]


@pytest.mark.fast
def test_the_order_of_the_source_without_shuffle():
    assert indices(take(5, data=replace(DATA, shuffle=False))) == [*range(10)] * 2


@pytest.mark.fast
@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_resume_needs_only_the_step(start: int):
    assert_equal(take(10 - start, data=LIVELY, start=start), take(10, data=LIVELY)[start:])


@pytest.mark.fast
def test_seeds_change_order_and_draws():
    assert indices(take(3)) != indices(take(3, seed=4))
    first, second = take(8, data=LIVELY), take(8, data=LIVELY, seed=4)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, second, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("hosts", [([0, 1], [2, 3]), ([0], [1], [2], [3]), ([0, 2], [1, 3])])
def test_hosts_hold_the_parts_of_one_batch(hosts: Sequence[list[int]]):
    whole = take(6, data=LIVELY)
    parts = [take(6, data=LIVELY, rows=rows) for rows in hosts]
    for step, batch in enumerate(whole):
        for name in ("images", "tokens", "weights", "indices", "epochs"):
            for rows, part in zip(hosts, parts, strict=True):
                expected = getattr(batch, name)[rows]
                np.testing.assert_array_equal(getattr(part[step], name), expected, name)


@pytest.mark.fast
def test_a_run_goes_on_with_another_number_of_hosts():
    """Stopped in mid-epoch and gone on with 4, then 2 hosts: no example twice, none left out."""
    seen = [list(zip(b.epochs, b.indices, strict=True)) for b in take(3, data=LIVELY)]
    for start, num_hosts in ((3, 4), (5, 2)):
        parts = [
            take(2, data=LIVELY, start=start, rows=range(4)[i * 4 // num_hosts :][: 4 // num_hosts])
            for i in range(num_hosts)
        ]
        for step in range(2):
            rows = [part[step] for part in parts]
            seen.append([place for b in rows for place in zip(b.epochs, b.indices, strict=True)])
    places = [(int(epoch), int(index)) for step in seen for epoch, index in step]
    assert sorted(places[:20]) == [(epoch, index) for epoch in range(2) for index in range(10)]
    assert len(set(places)) == len(places) == 28


@pytest.mark.fast
def test_crop_flip_and_caption_change_from_epoch_to_epoch():
    seen: dict[int, set[tuple[bytes, bytes]]] = {i: set() for i in range(10)}
    for batch in take(100, data=LIVELY):
        for row, index in enumerate(batch.indices):
            seen[int(index)].add((pixels(batch)[row].tobytes(), batch.tokens[row].tobytes()))
    assert all(len(views) >= 4 for views in seen.values())
    plain = {
        (int(index), pixels(batch)[row].tobytes())
        for batch in take(25)
        for row, index in enumerate(batch.indices)
    }
    assert len(plain) == 10, "the centre crop is the same in every epoch"


@pytest.mark.fast
def test_late_bad_images_weigh_nothing_and_are_counted():
    with loader(Numbered(bad=frozenset({2, 5}))) as batches:
        for batch in islice(batches, 5):
            is_bad = np.isin(batch.indices, [2, 5])
            np.testing.assert_array_equal(batch.weights, np.where(is_bad, 0, 1))
            assert not pixels(batch)[is_bad].any() and not batch.tokens[is_bad].any()
            assert len(batch.bad_images) == is_bad.sum()
        assert sorted(batches.bad_images) == [2, 5]
        assert batches.bad_images[2].path == "2.png"


@pytest.mark.fast
def test_too_many_late_bad_images_stop_the_run():
    with (
        loader(Numbered(bad=frozenset({2, 5, 6}))) as batches,
        pytest.raises(DataError, match=r"3 of 10 images became .* \(missing × 3\); the first"),
    ):
        list(islice(batches, 5))


@pytest.mark.fast
def test_a_fault_in_a_source_is_raised_with_its_traceback():
    before = threading.active_count()
    with loader(Numbered(fault="disk on fire")) as batches:
        with pytest.raises(RuntimeError, match="disk on fire") as caught:
            next(batches)
        assert "__getitem__" in [entry.name for entry in caught.traceback]
        with pytest.raises(ValueError, match="closed"):
            next(batches)
    wait_for_threads(before)


@pytest.mark.fast
def test_close_ends_the_threads():
    before = threading.active_count()
    batches = loader()
    next(batches)
    assert threading.active_count() > before
    batches.close()
    batches.close()
    wait_for_threads(before)


def wait_for_threads(expected: int) -> None:
    until = time.monotonic() + 300
    while threading.active_count() > expected and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= expected


@pytest.mark.fast
def test_it_reads_ahead_while_a_step_is_computed():
    read = threading.Semaphore(0)

    class Watched(Numbered):
        def __getitem__(self, index: int) -> Example:
            read.release()
            return super().__getitem__(index)

    with loader(Watched()) as batches:
        next(batches)
        for _ in range(8):  # the batch handed out, and another nobody has asked for
            assert read.acquire(timeout=300)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    skimage = pytest.importorskip("skimage")
    names = ["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "logo.png", "retina.jpg"]
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in names:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
        (folder / name).with_suffix(".txt").write_text(f"a photo of {name.partition('.')[0]}")
    return folder


def test_photographs_become_the_pixels_diffusers_would_train_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(photos.parent))
    data = replace(
        DATA, kind=DataKind.imagefolder, dir=str(photos), num_examples=None, shuffle=False
    )
    source = open_source(data, resolution=64, say=lambda line: None)
    with make_loader(
        source, Letters(), data, seed=0, global_batch_size=6, resolution=64
    ) as batches:
        batch = next(batches)
    with Image.open(photos / "chelsea.png") as image:  # 451 × 300
        reference = image.resize((int(64 * 451 / 300), 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pixels(batch)[2], np.asarray(reference.crop((16, 0, 80, 64))))
    assert "".join(map(chr, batch.tokens[2])) == "a ph"
    assert (photos.parent / ".cache/sdx/scans").is_dir()


@pytest.mark.fast
def test_sources_by_kind(tmp_path: Path):
    source = open_source(DATA, resolution=16)
    assert isinstance(source, ShapesSource) and len(source) == 10
    assert source[0].pixels.shape == (16, 16, 3)
    with pytest.raises(DataError, match=r"data\.num_examples=null"):
        open_source(replace(DATA, num_examples=None), resolution=16)
    folder = replace(DATA, kind=DataKind.imagefolder)
    with pytest.raises(DataError, match=r"data\.dir=null"):
        open_source(folder, resolution=16)
    with pytest.raises(DataError, match=r"no such folder"):
        open_source(replace(folder, dir=str(tmp_path / "absent")), resolution=16)


PROCESSES = """
import multiprocessing, signal, sys, traceback
sys.path[:0] = [{tests!r}]
from dataclasses import replace
from itertools import islice
from test_loader import LIVELY, Numbered, assert_equal, loader, take

def main():
    data = replace(LIVELY, num_workers=2)
    bad = Numbered(bad=frozenset([2]))
    left_open = loader(bad, data, start=1)
    held = list(islice(left_open, 5))
    print("workers", *[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[1] == "wait":
        signal.pause()
    assert_equal(held, take(5, bad, LIVELY, start=1))
    with loader(Numbered(fault="disk on fire"), replace(data, num_workers=1)) as batches:
        try:
            next(batches)
        except RuntimeError as error:
            text = "".join(traceback.format_exception(error))
            assert "disk on fire" in text and "__getitem__" in text, text
        else:
            raise AssertionError("no error")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("end", ["exit", "wait"])
def test_loader_processes(tmp_path: Path, end: str):
    """Same batches, errors with tracebacks, and no worker outlives the trainer, killed or not."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-W", "error", str(script), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        words = trainer.stdout.readline().split()
        try:
            assert words[:1] == ["workers"], "the script failed; see its traceback above"
            workers = [int(pid) for pid in words[1:]]
            assert len(workers) == 2
            if end == "wait":
                trainer.kill()
            assert trainer.wait(timeout=600) == (-9 if end == "wait" else 0)
        finally:
            trainer.kill()
    until = time.monotonic() + 300
    while any(is_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
