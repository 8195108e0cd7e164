"""Which process this is, from faked surroundings; and what is said where they do not fit."""

from dataclasses import replace

import pytest

from sdx.config.schema import DistributedConfig, HardwareConfig, Platform
from sdx.parallel.place import Place, ProcessesError, find_place

pytestmark = pytest.mark.fast

NOTHING = DistributedConfig()
CPU = HardwareConfig(name="cpu", platform=Platform.cpu, num_devices=4)
GPU_8X2 = HardwareConfig(name="box", platform=Platform.gpu, num_devices=16, num_hosts=2)
POD = HardwareConfig(name="tpu_v4_32", platform=Platform.tpu, num_devices=16, num_hosts=4)


def slurm(process: int, tasks: int, per_node: int, **more: str) -> dict[str, str]:
    """The environment of a task of srun, nodes filled one after the other."""
    nodes = tasks // per_node
    return {
        "SLURM_JOB_ID": "70000",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[007-010,012],login1",
        "SLURM_NTASKS": "64",  # of the job
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process % per_node),
        "SLURM_NODEID": str(process // per_node),
        **more,
    }


def test_alone_where_nothing_says_otherwise() -> None:
    assert find_place(NOTHING, CPU, {}) is None
    assert find_place(NOTHING, replace(CPU, num_devices=None), {"SLURM_JOB_ID": "1"}) is None
    assert find_place(NOTHING, CPU, slurm(0, 1, 1)) is None, "one task is one process"


def test_given_keys_win() -> None:
    given = DistributedConfig(coordinator_address="a:1", num_processes=2, process_id=1)
    found = find_place(given, CPU, slurm(3, 4, 4))
    assert found == Place("distributed.*", "a:1", 2, 1)


def test_variables_of_jax() -> None:
    surroundings: dict[str, str] = {
        "JAX_COORDINATOR_ADDRESS": "host:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "2",
    }
    assert find_place(NOTHING, CPU, surroundings) == Place("JAX's variables", "host:1234", 4, 2)
    with pytest.raises(ProcessesError, match="JAX_PROCESS_ID=two: must be a whole number"):
        find_place(NOTHING, CPU, surroundings | {"JAX_PROCESS_ID": "two"})


def test_slurm_says_the_first_node_and_a_port_of_the_step() -> None:
    first = find_place(NOTHING, CPU, slurm(2, 4, 2))
    assert first is not None
    assert (first.source, first.num_processes, first.process_id) == ("SLURM", 4, 2)
    assert first.coordinator_address == f"gpu007:{61440 + 70000 % 4096}"
    other_step = find_place(NOTHING, CPU, slurm(2, 4, 2, SLURM_STEP_ID="1"))
    assert other_step is not None and other_step.coordinator_address != first.coordinator_address
    plain = find_place(NOTHING, CPU, slurm(2, 4, 2, SLURM_STEP_NODELIST="n1,n2"))
    assert plain is not None and plain.coordinator_address.startswith("n1:")
    own = DistributedConfig(coordinator_address="10.0.0.1:99")
    given = find_place(own, CPU, slurm(2, 4, 2))
    assert given is not None and given.coordinator_address == "10.0.0.1:99"


@pytest.mark.parametrize(
    ("tasks", "per_node", "visible", "gpus"),
    [
        (2, 1, None, None),  # one task a node has all of them
        (2, 1, "0,1,2,3,4,5,6,7", None),
        (16, 8, "0,1,2,3,4,5,6,7", (1,)),  # task 9 is the second of its node
        (16, 8, "3", None),  # srun --gpus-per-task=1
        (16, 8, None, (1,)),
        (4, 2, "0,1,2,3,4,5,6,7", (4, 5, 6, 7)),
    ],
)
def test_gpus_of_a_task(
    tasks: int, per_node: int, visible: str | None, gpus: tuple[int, ...] | None
) -> None:
    more = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    process = per_node + 1 if per_node > 1 else 1
    found = find_place(NOTHING, GPU_8X2, slurm(process, tasks, per_node, **more))
    assert found is not None and found.local_device_ids == gpus
    bare = find_place(NOTHING, CPU, slurm(1, 4, 2, **more))
    assert bare is not None and bare.local_device_ids is None, "CPUs are not counted out"
    unsized = HardwareConfig(name="gpu", platform=Platform.gpu)
    if visible == "0,1,2,3,4,5,6,7" and per_node == 2:
        found = find_place(NOTHING, unsized, slurm(process, tasks, per_node, **more))
        assert found is not None and found.local_device_ids == gpus


def test_the_metadata_of_a_tpu_is_asked_of_tpus_alone() -> None:
    worker = Place("the TPU's metadata", "10.1.1.1:8482", 4, 3)
    assert find_place(NOTHING, POD, {}, tpu_place=lambda: worker) == worker
    assert find_place(NOTHING, CPU, {}, tpu_place=lambda: worker) is None
    assert find_place(NOTHING, replace(POD, simulate=True), {}, tpu_place=lambda: worker) is None


def test_hosts_without_processes_are_told_what_to_do() -> None:
    with pytest.raises(ProcessesError) as told:
        find_place(NOTHING, POD, {"SLURM_JOB_ID": "17", "TPU_WORKER_ID": "secret"})
    text = str(told.value)
    for part in (
        "hardware.num_hosts=4",
        "run_on=... starts it there (docs/slurm.md, docs/tpu.md).",
        "sdx.plan hardware=tpu_v4_32",
        "hardware.simulate=true",
        "variables seen: SLURM_JOB_ID, TPU_WORKER_ID",
        "srun --ntasks=4",
    ):
        assert part in text, text
    assert "17" not in text and "secret" not in text, "values are nobody's business"
    with pytest.raises(ProcessesError, match=r"one process \(SLURM\)"):
        find_place(NOTHING, POD, slurm(0, 1, 1))


@pytest.mark.parametrize(
    ("hardware", "count", "allowed"),
    [(CPU, 3, "take 1, 2, 4"), (GPU_8X2, 8, None), (GPU_8X2, 3, "take 2, 4, 8, 16"),
     (POD, 8, "take 4;"), (replace(CPU, num_devices=None), 3, None)],
)  # fmt: skip
def test_numbers_of_processes_that_fit(
    hardware: HardwareConfig, count: int, allowed: str | None
) -> None:
    given = DistributedConfig(coordinator_address="a:1", num_processes=count, process_id=0)
    if allowed is None:
        assert find_place(given, hardware, {}) is not None
        return
    with pytest.raises(ProcessesError, match=f"{count} processes were found.*{allowed}"):
        find_place(given, hardware, {})


def test_an_address_alone_is_not_enough() -> None:
    with pytest.raises(ProcessesError, match=r"add distributed\.num_processes"):
        find_place(DistributedConfig(coordinator_address="a:1"), CPU, {})
