"""The cluster of the tests itself: it runs jobs, and nothing of it outlives who started it."""

import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import require
from tests.launchers.slurm_cluster import REPOSITORY, Cluster, Settings, missing
from tests.launchers.slurm_runs import until

_OWNER = """
import time
from tests.launchers.slurm_cluster import Settings, running
with running(Settings(nodes=1, accounting=False)) as cluster:
    cluster.run("sbatch", "--output=/dev/null", "--wrap=srun sleep 3600")
    while "RUNNING" not in cluster.queue().values():
        time.sleep(0.1)
    print(cluster.folder, flush=True)
    time.sleep(3600)
"""


def test_tasks_have_nodes_and_gpus_of_their_own(slurm: Cluster) -> None:
    say = 'echo "$SLURMD_NODENAME $SLURM_PROCID $CUDA_VISIBLE_DEVICES"'
    tasks = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=2")
    said = slurm.run("srun", *tasks, "sh", "-c", say).splitlines()
    first, second = sorted({line.split()[0] for line in said})
    assert sorted(line.partition(" ")[2] for line in said) == ["0 0,1", "1 2,3", "2 0,1", "3 2,3"]
    assert {first, second} <= {*slurm.nodes}


def test_a_cluster_ends_with_a_killed_owner() -> None:
    lacking = missing(Settings(accounting=False))
    require(lacking is None, lacking or "")
    command = [sys.executable, "-c", _OWNER]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert _processes_of(folder)
        owner.send_signal(signal.SIGKILL)
    until(lambda: not folder.exists() and not _processes_of(folder))


def _processes_of(folder: Path) -> list[str]:
    """Command lines of what runs with that cluster in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:  # gone meanwhile
            continue
    return found
