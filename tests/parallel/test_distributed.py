"""What JAX's own detection finds on a TPU, and what is kept from the terminal."""

import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster, cluster

from sdx.config.schema import DistributedConfig, HardwareConfig, Platform
from sdx.parallel import distributed
from sdx.parallel.distributed import start_processes
from sdx.parallel.place import Place, ProcessesError
from tests.processes import REPOSITORY

pytestmark = pytest.mark.fast

POD = HardwareConfig(name="tpu_v4_32", platform=Platform.tpu, num_devices=16, num_hosts=4)


@pytest.fixture
def tpu_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a slice of four hosts, as its variables tell it."""
    for module in (cloud_tpu_init, cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,host1,host2,host3")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    for slices in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"):
        monkeypatch.setenv(f"MEGASCALE_{slices}", "")  # else JAX asks the metadata server


@pytest.mark.usefixtures("tpu_vm")
def test_a_worker_of_a_tpu_knows_its_place() -> None:
    found = distributed._tpu_place(timeout_s=5)
    assert found == Place("the TPU's metadata", "localhost:8482", 4, 2)


@pytest.mark.usefixtures("tpu_vm")
def test_several_slices_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    found = distributed._tpu_place(timeout_s=5)
    assert found is not None and (found.num_processes, found.process_id) == (8, 6)


@pytest.mark.usefixtures("tpu_vm")
def test_metadata_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_WORKER_ID", "none")
    with pytest.raises(ProcessesError, match=r"could not be read.*give distributed\."):
        start_processes(DistributedConfig(), POD, print)


def test_elsewhere_there_is_none() -> None:
    assert distributed._tpu_place(timeout_s=1) is None
    with pytest.raises(ProcessesError, match="no sign of other processes"):
        start_processes(DistributedConfig(), POD, print)


def test_only_lines_of_c_are_silenced() -> None:
    script = (
        "import ctypes; from sdx.parallel.distributed import _silence_gloo; _silence_gloo();"
        "ctypes.CDLL(None).puts(b'[Gloo] Rank 0'); ctypes.CDLL(None).fflush(None); print('ours')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "ours\n"


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = DistributedConfig(coordinator_address=address, num_processes=2, process_id=0)
        with pytest.raises(ProcessesError, match=f"{address} .*cannot listen at this port"):
            start_processes(config, replace(POD, platform=Platform.cpu, num_hosts=2), print)
