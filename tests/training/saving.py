"""Saves and restores checkpoints as one of several processes, and says what came of it as JSON.

    python -m tests.training.saving ACT,ACT... FOLDER DATA FSDP distributed.*=...

Acts: `save=STEP`, `go_on=STEP` (restores first), `restore`, `restore_once` (one copy of the model
is read and sent to the others).
The state of a step is `state_of(step)`; every array has a number that bits alone tell apart.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdx.config.schema import DistributedConfig, HardwareConfig, Platform
from sdx.parallel.agreement import from_each, from_first, gather
from sdx.parallel.distributed import start_processes
from sdx.parallel.mesh import AXES, claim_devices
from sdx.record.store import as_path
from sdx.training.checkpoint import Checkpointer

SPECS = {
    "step": P(),
    "params": {"kernel": P("fsdp"), "bias": P()},
    "mu": {"kernel": P(None, "fsdp"), "half": P("fsdp")},
}


def state_of(step: int) -> dict[str, Any]:
    """Minus zero, and a NaN with a payload, among numbers of that step."""
    draw = np.random.default_rng(step)
    kernel = draw.standard_normal((256, 512)).astype(np.float32)
    kernel[0, 0] = -0.0
    kernel.view(np.uint32)[1, 1] = 0x7FC12345
    return {
        "step": np.int32(step),
        "params": {"kernel": kernel, "bias": kernel[0, :3]},
        "mu": {"kernel": kernel[:, ::-1].copy(), "half": kernel.astype(jax.numpy.bfloat16)},
    }


def placed(step: int, mesh: Mesh) -> dict[str, Any]:
    """The state on the mesh."""
    return jax.tree.map(
        lambda x, place: jax.make_array_from_callback(
            np.shape(x), place, lambda i: np.asarray(x)[i]
        ),
        state_of(step),
        places(mesh),
    )


def places(mesh: Mesh) -> dict[str, Any]:
    """Where each array of a state lies."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P)
    )


def abstract(mesh: Mesh) -> dict[str, Any]:
    """The state as it is wanted."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place),
        state_of(0),
        places(mesh),
    )


def is_equal(state: dict[str, Any], step: int) -> bool:
    """To the bit, in each part that this process has."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True)
    return all(
        np.asarray(part.data).tobytes() == np.asarray(value)[part.index].tobytes()
        for array, value in pairs
        for part in array.addressable_shards
    )


def restored(checkpointer: Checkpointer, mesh: Mesh) -> dict[str, Any]:
    """Which step came back, whether it is what was saved, and the bytes this process read for
    it."""
    before = read_bytes()
    found = checkpointer.restore(abstract(mesh))
    assert found is not None
    step, state = found
    return {"step": step, "read": read_bytes() - before, "equal": is_equal(state, step)}


def read_bytes() -> int:
    """That this process has read of files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def main() -> None:
    acts, folder, data, fsdp, *keys = sys.argv[1:]
    given = dict(key.removeprefix("distributed.").split("=") for key in keys)
    address, count, number = (
        given[name] for name in ("coordinator_address", "num_processes", "process_id")
    )
    hardware = HardwareConfig(name="cpu", platform=Platform.cpu, num_devices=int(data) * int(fsdp))
    start_processes(
        DistributedConfig(address, int(count), int(number)), hardware, lambda failure: None
    )
    claim_devices(hardware)
    mesh = Mesh(np.array(jax.devices()).reshape(int(data), int(fsdp), 1), AXES)
    said: list[str] = []
    done: dict[str, Any] = {"agreed": agreed(int(number))}
    for act in acts.split(","):
        once = mesh if act == "restore_once" else None
        checkpointer = Checkpointer(as_path(folder), keep=2, say=said.append, reads_once=once)
        if act.startswith(("save=", "go_on=")):
            step = int(act.partition("=")[2])
            if act.startswith("go_on="):
                restored(checkpointer, mesh)
            checkpointer.save(step, placed(step, mesh))
            checkpointer.wait()
            done[act] = checkpointer.steps()
        else:
            restored(checkpointer, mesh)  # modules are read too
            done[act] = restored(checkpointer, mesh)
        checkpointer.close()
    print(json.dumps(done | {"said": said}))


def agreed(number: int) -> list[Any]:
    """What the first process decides, what each one has, and errors of the first, then of the
    second."""
    heard = []
    for decide, given in ((from_first, "none"), (from_each, "none" if number == 1 else "5")):
        try:
            decide(lambda given=given: int(given), (KeyError, ValueError))
        except ValueError as error:
            heard.append(str(error).endswith("with base 10: 'none'"))
    decided = [from_first(lambda: {"from": number}) for _ in range(600)]
    return [decided[-1], gather(number + from_each(lambda: 1)), gather(heard)]


if __name__ == "__main__":
    main()
