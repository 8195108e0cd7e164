"""A cache made by two real processes, each with shards of its own."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from sdx.data.cache.records import read_index
from tests.processes import run

# sdx.encode whose second process is late to look at what it has.
SLOW = """
import sys, time
from sdx.encode import main
from sdx.experiment.encoding import encoding
judge = encoding.sound_shards
def late(*args, **how):
    time.sleep(3 if "distributed.process_id=1" in sys.argv else 0)
    return judge(*args, **how)
encoding.sound_shards = late
sys.exit(main())
"""


def test_a_shard_made_anew_by_one_process_is_waited_for_by_the_other(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), 50 * i, np.uint8)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"grey {i}")
    command = [
        "data=imagefolder",
        f"data.dir={photos}",
        f"data.cache_dir={tmp_path / 'caches'}",
        "data.cache=moments_and_context",
        "data.resolution=16",
        "hardware.num_devices=2",
        "mesh=dp",
        "train.per_device_batch_size=1",
        "distributed.heartbeat_timeout_s=30",
        f"run.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
    ]
    ended = run(["-m", "sdx.encode", *command])
    assert ended.codes == [0, 0], ended
    folders = {path.name.partition("-")[0]: path for path in (tmp_path / "caches").iterdir()}
    indices = {name: read_index(folder) for name, folder in folders.items()}
    assert [*sorted(indices)] == ["context", "moments"] and None not in indices.values()
    for folder in folders.values():  # as if this image had been unreadable when they were written
        path = folder / "00001.json"
        bad = {"index": 1, "path": "1.png", "reason": "missing", "detail": ""}
        path.write_text(json.dumps({**json.loads(path.read_text()), "bad_images": [bad]}))
    again = run(["-c", SLOW, *command])
    assert again.codes == [0, 0], again
    assert {name: read_index(folder) for name, folder in folders.items()} == indices
