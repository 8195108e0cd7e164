"""Joining the other processes of a run, before any device is asked for.

Which process this is says place.py; how they stop and fail together, stopping.py and failures.py.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax._src import cloud_tpu_init, clusters  # what knows a TPU's metadata; it has no public name

from sdx.config.schema import DistributedConfig, HardwareConfig, Platform
from sdx.parallel.failures import EXIT_FAILED, Companions, Failure
from sdx.parallel.place import Place, ProcessesError, find_place


def start_processes(
    distributed: DistributedConfig,
    hardware: HardwareConfig,
    on_failure: Callable[[Failure], None],
) -> Companions:
    """Joins the other processes of the run, which end with each other while what is returned is
    entered; `on_failure` shows and records why.

    Call it before anything else of JAX. Raises ProcessesError where `hardware` needs other
    processes than there are. Where they do not come in time the process ends, with exit code 1.
    """
    place = find_place(
        distributed,
        hardware,
        os.environ,
        tpu_place=lambda: _tpu_place(distributed.initialization_timeout_s),
    )
    if place is None:
        return Companions(on_failure=on_failure)
    if place.process_id == 0:
        _check_port(place)
    with _limited(distributed.initialization_timeout_s, place):
        jax.distributed.initialize(
            place.coordinator_address,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=10 * distributed.initialization_timeout_s,  # ours comes first
            # Ours ends the run with a reason; JAX's, should that fail, with a C++ stack.
            heartbeat_timeout_seconds=2 * distributed.heartbeat_timeout_s + 5,
            shutdown_timeout_seconds=distributed.shutdown_timeout_s,
        )
    if hardware.platform is Platform.cpu or hardware.simulate:
        _silence_gloo()
    return Companions(
        place.process_id,
        place.num_processes,
        heartbeat_timeout_s=distributed.heartbeat_timeout_s - 1.0,  # all are to be gone by then
        on_failure=on_failure,
    )


def _silence_gloo() -> None:
    """Keeps what C++ prints to standard output from the user: Gloo, which joins CPUs, has a line
    there for each device and each group of them. Python's own goes where it went."""
    sys.stdout.flush()
    ours = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)


def _check_port(place: Place) -> None:
    """Raises ProcessesError where process 0 cannot listen; JAX 0.10 ends with a segmentation fault
    there."""
    port = int(place.coordinator_address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ProcessesError(
            f"{place.coordinator_address} (from {place.source}): process 0 cannot listen at this "
            f"port ({os.strerror(error.errno or 0)}); give "
            "distributed.coordinator_address=HOST:PORT with one that nothing uses there."
        ) from error


def _tpu_place(timeout_s: int) -> Place | None:
    """What JAX reads of the metadata of a TPU VM, or of Kubernetes' variables for one."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm:
        return None
    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        address, count, number, _ = find(None, None, None, None, None, timeout_s)
    except Exception as error:  # of requests, sockets or a text it did not expect
        raise ProcessesError(
            f"hardware.platform=tpu: the metadata of this TPU could not be read ({error}); give "
            "distributed.{coordinator_address,num_processes,process_id}."
        ) from error
    if address is None or count is None or number is None:
        return None
    return Place("the TPU's metadata", address, count, number)


@contextmanager
def _limited(timeout_s: int, place: Place) -> Iterator[None]:
    """Ends the process with one clear line where the others do not come; JAX would abort it with a
    C++ stack."""
    is_there = threading.Event()

    def end() -> None:
        if is_there.wait(timeout_s):
            return
        print(
            f"sdx: process {place.process_id} of {place.num_processes} waited {timeout_s} s "
            f"(distributed.initialization_timeout_s) for the others at {place.coordinator_address}"
            f" (from {place.source}), not all came.\nfix: start {place.num_processes} processes, "
            "all with the same address, which all hosts must reach; see what the others say.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_FAILED)

    threading.Thread(target=end, name="sdx-start", daemon=True).start()
    try:
        yield
    finally:
        is_there.set()
