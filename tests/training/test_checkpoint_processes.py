"""Checkpoints of 4 processes, of 2 and of 1: each restores the others', bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from sdx.parallel.mesh import AXES
from sdx.record.store import AnyPath, ObjectPath, as_path, download
from sdx.training.checkpoint import Checkpointer, restore_params
from tests import processes
from tests.micro import micro_mesh
from tests.training.saving import abstract, is_equal, placed, state_of


def act(
    num_processes: int, acts: str, folder: AnyPath, data: int, fsdp: int, **environment: str
) -> list[dict[str, Any]]:
    """What each of the processes says it did."""
    arguments = ["-m", "tests.training.saving", acts, str(folder), str(data), str(fsdp)]
    ended = processes.run(arguments, num_processes=num_processes, environment=environment)
    assert ended.codes == [0] * num_processes, ended
    return [json.loads(output.splitlines()[-1]) for output in ended.outputs]


def alone(folder: AnyPath, mesh: Mesh, *, saves: int) -> int:
    """Restores in this process, then saves; the step that was restored."""
    checkpointer = Checkpointer(folder, keep=2, say=print)
    found = checkpointer.restore(abstract(mesh))
    assert found is not None and is_equal(found[1], found[0])
    checkpointer.save(saves, placed(saves, mesh))
    checkpointer.close()
    return found[0]


def test_written_by_four_restored_by_two_and_one_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for number, done in enumerate(act(4, "save=1,save=2,save=3", folder, 2, 2)):
        assert [done[f"save={step}"] for step in (1, 2, 3)] == [[1], [1, 2], [2, 3]]
        assert done["agreed"] == [{"from": 0}, [1, 2, 3, 4], [[True, True]] * 4], number
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"], "no draft is left"
    proven = json.loads((folder / "3" / "manifest.json").read_text())["files"]
    files = {
        p.relative_to(folder / "3").as_posix() for p in (folder / "3").rglob("*") if p.is_file()
    }
    assert proven.keys() == files - {"manifest.json"}
    assert {f"state/ocdbt.process_{number}" for number in range(4)} <= {
        "/".join(name.split("/")[:2]) for name in files
    }, "each process has written"
    for done in act(2, "restore,save=4", folder, 1, 2):
        assert done["restore"]["step"] == 3 and done["restore"]["equal"]
        assert done["save=4"] == [3, 4]
    assert alone(folder, micro_mesh(2, data=1, fsdp=2), saves=5) == 4
    (folder / "5" / "state" / "manifest.ocdbt").write_bytes(b"damaged")
    for number, done in enumerate(act(4, "restore,restore_once", folder, 2, 2)):
        assert (
            "checkpoint 5 is damaged" in done["said"][0] and "continuing from 4" in done["said"][0]
        )
        for way in ("restore", "restore_once"):
            assert done[way]["step"] == 4 and done[way]["equal"], (number, way)
        is_sent = number >= 2  # of the second copy of the model
        assert (done["restore_once"]["read"] < 4096) == is_sent, done
        assert done["restore"]["read"] > 100_000, done


@pytest.mark.parametrize("axes", [(4, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_one_copy_is_read_and_all_have_it(
    tmp_path: Path, axes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdx.training.replicas.SENT_AT_ONCE", 300_000)  # several broadcasts
    mesh = micro_mesh(4, **dict(zip(AXES, axes, strict=True)))
    checkpointer = Checkpointer(tmp_path, keep=2, say=print, reads_once=mesh)
    checkpointer.save(7, placed(7, mesh))
    checkpointer.wait()
    found = checkpointer.restore(abstract(mesh))
    checkpointer.close()
    assert found is not None and is_equal(found[1], 7)
    wanted = abstract(mesh)
    assert found[1]["mu"]["kernel"].sharding == wanted["mu"]["kernel"].sharding
    assert np.signbit(np.asarray(found[1]["params"]["bias"])[0])


def test_hosts_without_a_common_disk_write_to_a_store(bucket: str, tmp_path: Path) -> None:
    """Two of them, then this process, then four which find that one's step damaged."""
    folder = as_path(f"{bucket}/run/checkpoints")
    assert isinstance(folder, ObjectPath)
    scratch = [tmp_path / "scratch" / str(number) for number in range(4)]
    for path in scratch:
        path.mkdir(parents=True)
    own = {"TMPDIR": str(tmp_path / "scratch" / "{process}")}
    acts = ("save=1", "save=2", "go_on=3")
    for done in act(2, ",".join(acts), folder, 2, 2, **own):
        assert [done[name] for name in acts] == [[1], [1, 2], [2, 3]]
    proven = json.loads((folder / "3" / "manifest.json").read_text())["files"]
    assert proven.keys() == (folder / "3").files().keys() - {"manifest.json"}
    parts = {name.split("/")[1] for name in proven}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts and "manifest.ocdbt" not in parts
    download(folder, tmp_path / "copied")
    for written, path in ((3, folder), (2, tmp_path / "copied")):
        step, params = restore_params(path, "params", step=written, say=print)
        wanted = state_of(step)["params"]
        assert all(params[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert alone(folder, micro_mesh(2, data=1, fsdp=2), saves=4) == 3
    (folder / "4" / "state" / "manifest.ocdbt").write_bytes(b"damaged")
    for number, done in enumerate(act(4, "restore,restore_once", folder, 2, 2, **own)):
        assert "checkpoint 4 is damaged" in done["said"][0], number
        for way in ("restore", "restore_once"):
            assert done[way]["step"] == 3 and done[way]["equal"], (number, way)
    assert [list(path.iterdir()) for path in scratch] == [[]] * 4
