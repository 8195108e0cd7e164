"""DESIGN.md's TPU command for real, without a cloud: a stand-in of Google's API, four sshds as the
workers of a slice, the trainer as four processes on them."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdx.data.cache.records import read_index
from sdx.record.metrics import read_metrics
from sdx.record.paths import RunPaths
from sdx.record.status import Status, read_status
from sdx.record.store import AnyPath, as_path
from tests.launchers.slurm_runs import MODEL, STEPS
from tests.launchers.source_tree import SourceTree
from tests.launchers.sshd import SshdWorker, ssh_overrides, sshd_workers
from tests.launchers.tpu_server import TpuServer, serving
from tests.object_store import ENVIRONMENT
from tests.processes import Processes, free_port

DEADLINE_S = 900.0
CANARY = "hf_" + "canary" * 6
COMPILES = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # in a third of the time
VARIABLES = {
    **COMPILES,
    "HF_TOKEN": CANARY,
    "SDX_TEST_SLOW": "0.3",  # to be caught at work
}
STORE = (*ENVIRONMENT, "AWS_ENDPOINT_URL")
ONE_JOB = (*MODEL, "hardware.topology=null", "run.name=r", "optimizer.lr=1e-3")


@dataclass(frozen=True)
class Cloud:
    """Somebody's laptop, with a TPU API and the workers that it hands out."""

    tree: SourceTree
    folder: Path
    server: TpuServer
    endpoint: str
    workers: list[SshdWorker]

    @contextmanager
    def typed(
        self,
        output_dir: str,
        *names: str,
        command: Sequence[str] = ("train",),
        variables: Mapping[str, str] = VARIABLES,
    ) -> Iterator[Processes]:
        """The sweep of one job, running; killed on leaving where it has not ended. Its processes
        have `variables`, and those of this process with such `names`."""
        arguments = [
            "run_on=tpu_v4_32", "hardware.simulate=true", *ONE_JOB,
            "hardware.num_devices=4", "hardware.num_hosts=4", f"run.output_dir={output_dir}",
            f"distributed.coordinator_address=127.0.0.1:{free_port()}",
            "hydra.launcher.project=a-project", "hydra.launcher.zone=us-central2-b",
            f"hydra.launcher.api_endpoint={self.endpoint}", "hydra.launcher.owner=ann",
            f"hydra.launcher.mounts=[{self.folder / 'mount'}]", "hydra.launcher.poll_s=0.2",
            f"hydra.launcher.python={sys.executable}",
            f"hydra.launcher.environment=[{','.join((*variables, *names))}]",
            *ssh_overrides(self.workers),
        ]  # fmt: skip
        own = {**variables, "XDG_STATE_HOME": str(self.folder / "state")}
        process = self.tree.start(*command, *arguments, where=self.folder, environment=own)
        processes = Processes([process])
        try:
            yield processes
        finally:
            process.kill()
            processes.end(0)

    def alone(self) -> list[float]:
        """Losses of the same training in one process of this machine."""
        place = f"run.output_dir={self.folder / 'alone'}"
        started = self.tree.start("train", *ONE_JOB, place, where=self.folder, environment=COMPILES)
        ended = Processes([started]).end(DEADLINE_S)
        assert ended.codes == [0], str(ended)
        return losses(self.folder / "alone" / "r")

    def take_away(self) -> None:
        """The TPU is preempted: its machines are gone at once, with all they had."""
        [name] = self.server.names("ACTIVE")
        self.server.preempt(name)
        for worker in self.workers:
            worker.pull_the_plug()
        for worker in self.workers:
            worker.renew()

    def is_quiet(self) -> bool:
        return not any(worker.processes() for worker in self.workers)

    @property
    def run(self) -> RunPaths[AnyPath] | None:
        """The run of the sweep's one job, once it is in the manifest."""
        records = [self.folder / "outputs", self.folder / "mount" / "runs"]
        found = [path for record in records for path in record.glob("sweeps/*/sweep.json")]
        jobs = [job for path in found for job in json.loads(path.read_text())["jobs"]]
        return RunPaths(as_path(jobs[0]["run"])) if jobs else None

    @property
    def status(self) -> Status | None:
        status = self.run and read_status(self.run)
        return status and status.status

    @property
    def step(self) -> int:
        """The last one in the metrics."""
        rows = read_metrics(self.run.metrics) if self.run else []
        return rows[-1]["step"] if rows else 0


@pytest.fixture
def cloud(tmp_path: Path, source_tree: SourceTree) -> Iterator[Cloud]:
    (tmp_path / "mount").mkdir()
    server = TpuServer(step_s=0.3)
    with sshd_workers(tmp_path / "ssh") as workers, serving(server) as endpoint:
        yield Cloud(source_tree, tmp_path, server, endpoint, workers)


def losses(run: AnyPath) -> list[float]:
    return [row["loss"] for row in read_metrics(RunPaths(run).metrics)]


def wait_until(condition: Callable[[], object], processes: Processes, runs: bool = True) -> None:
    """Fails with what the command said where it `runs` no longer before."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert not runs or processes.running[0].poll() is None, processes.output(0)
        assert time.monotonic() < deadline, processes.output(0)
        time.sleep(0.1)


def files_with(text: str, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    return [path for path in files if text.encode() in path.read_bytes()]


def contents_of(bucket: str) -> list[bytes]:
    import boto3

    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=name)["Contents"]]
    return [client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys]


def test_a_sweep_goes_on_after_its_launcher_was_killed_and_its_tpu_taken_away(
    cloud: Cloud, bucket: str
) -> None:
    """The workers share a bucket and nothing else."""
    place = f"{bucket}/runs"
    with cloud.typed(place, *STORE) as first:
        wait_until(lambda: cloud.step >= 4, first)
        first.send(0, signal.SIGKILL)
        wait_until(lambda: cloud.is_quiet() and cloud.status is Status.interrupted, first, False)
    [stray] = cloud.server.names()
    with cloud.typed(place, *STORE) as second:
        begun = cloud.step
        assert begun < STEPS
        wait_until(lambda: cloud.step > begun, second)
        assert cloud.server.names("ACTIVE") not in ([], [stray])
        cloud.take_away()
        ended = second.end(DEADLINE_S)
    assert ended.codes == [0], str(ended)
    assert cloud.status is Status.finished and cloud.server.names() == [] and cloud.is_quiet()
    assert cloud.run is not None
    reached = losses(cloud.run.root)
    assert len(reached) == STEPS and reached == pytest.approx(cloud.alone(), rel=1e-6)
    assert CANARY not in ended.outputs[0] and files_with(CANARY, cloud.folder) == []
    assert not any(CANARY.encode() in content for content in contents_of(bucket))


def test_a_worker_that_fails_ends_the_job_and_is_named(cloud: Cloud) -> None:
    """The workers share a mounted folder and nothing else."""
    fault = {**VARIABLES, "SDX_TEST_RAISE": "2:3", "SDX_TEST_SLOW": "0"}
    with cloud.typed(str(cloud.folder / "mount" / "runs"), variables=fault) as sweep:
        ended = sweep.end(DEADLINE_S)
    said = str(ended)
    assert ended.codes == [1], said
    assert "process 2" in said and "ArithmeticError: a fault planted in rank 2" in said, said
    assert cloud.status is Status.failed
    assert cloud.server.names() == [] and cloud.is_quiet()


def test_an_encoding_is_shared_by_the_workers(cloud: Cloud) -> None:
    place = str(cloud.folder / "mount" / "runs")
    encode = ("encode", f"data.cache_dir={cloud.folder / 'mount' / 'cache'}")
    with cloud.typed(place, command=encode, variables=COMPILES) as sweep:
        ended = sweep.end(DEADLINE_S)
    said = str(ended)
    assert ended.codes == [0] and "complete and verified" in said, said
    assert "encoding 12 of 40 images" in said, "the others encode the rest"
    [folder] = (cloud.folder / "mount" / "cache").iterdir()
    index = read_index(folder)
    assert index is not None and sum(shard.records for shard in index.shards) == 40
    assert cloud.server.names() == [] and cloud.is_quiet()
