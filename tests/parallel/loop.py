"""A run of many processes reduced to how it begins, waits, stops and fails.

    python -m tests.parallel.loop OPTION=VALUE ... distributed.*=...

Each step is a sum over a device of each process. Options: `steps`, `raise=PROCESS@STEP`,
`compile=PROCESS` (it is there while the others wait for it), `heartbeat`, `initialization`.
"""

import hashlib
import sys
import time
import traceback

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdx.config.schema import DistributedConfig, HardwareConfig, Platform
from sdx.parallel.agreement import process_index
from sdx.parallel.distributed import start_processes
from sdx.parallel.failures import Companions, Failure
from sdx.parallel.mesh import claim_devices
from sdx.parallel.stopping import EXIT_INTERRUPTED, StopFlag

OPTIONS = dict(text.split("=", 1) for text in sys.argv[1:])


def main() -> int:
    distributed = DistributedConfig(
        coordinator_address=OPTIONS["distributed.coordinator_address"],
        num_processes=int(OPTIONS["distributed.num_processes"]),
        process_id=int(OPTIONS["distributed.process_id"]),
        initialization_timeout_s=int(OPTIONS.get("initialization", 300)),
        heartbeat_timeout_s=int(OPTIONS.get("heartbeat", 600)),
    )
    hardware = HardwareConfig(
        name="cpu", platform=Platform.cpu, num_devices=distributed.num_processes
    )
    with StopFlag(lambda: print("ended early", flush=True)) as stop:
        with stop.compiling():
            companions = start_processes(distributed, hardware, on_failure)
            stop.join(companions)
        claim_devices(hardware)
        with companions:
            try:
                return steps(stop)
            except Exception as error:
                return failed(companions, error)


def on_failure(failure: Failure) -> None:
    if failure.exit_code == EXIT_INTERRUPTED:
        print("interrupted", flush=True)
    else:
        print(f"{failure.trace}failed: {failure.said}", flush=True)


def failed(companions: Companions, error: Exception) -> int:
    reason = f"{type(error).__name__}: {error}"
    return companions.fail(1, reason, trace=traceback.format_exc())


def steps(stop: StopFlag) -> int:
    mesh = Mesh(jax.devices(), ("all",))
    place = NamedSharding(mesh, PartitionSpec("all"))
    total = jax.jit(lambda rows: rows.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in range(int(OPTIONS.get("steps", 2000))):
        if stop.agreed():
            print(f"{stop.signal_name}: stopped before step {step}", flush=True)
            return EXIT_INTERRUPTED
        if OPTIONS.get("raise") == f"{process_index()}@{step}":
            raise OSError("the disk is gone")
        if step == 3 and OPTIONS.get("compile") == str(process_index()):
            with stop.compiling():
                print("compiling", flush=True)
                hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
        rows = jax.make_array_from_process_local_data(place, np.ones(1, np.float32))
        assert float(total(rows)) == mesh.size
        if step == 2:
            print("ready", flush=True)
        time.sleep(0.01)
    return 0


if __name__ == "__main__":
    sys.exit(main())
