"""A real SLURM cluster on one machine: slurmctld, slurmd for each node, slurmdbd with MariaDB.

    python -m tests.launchers.slurm_cluster FOLDER '{"nodes": 2}'

As a program it is the keeper of a cluster in FOLDER: it starts the daemons, says one line when all
nodes are there, and ends them, every job of theirs, and FOLDER when its standard input closes. So
nothing is left of a cluster whose test session was killed. It must be root, for SLURM runs jobs as
whoever submits them.

Nodes are called 127.0.0.1, 127.0.0.2, …: names that resolve everywhere, as those of a real cluster
do, and all of them this machine. Cores and GPUs are made up (`SlurmdParameters=config_overrides`;
a GPU must be a character device, its number is not looked at). Facts: slurm.conf(5), gres.conf(5),
slurmdbd.conf(5) of SLURM 22.05, and trials.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
DAEMONS = ("slurmctld", "slurmd")
ACCOUNTING = ("sacct", "sacctmgr", "slurmdbd", "mariadbd", "mariadb", "mariadb-install-db")
_SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_STARTS_S = 180.0
_SUBREAPER, _DEATH_SIGNAL = 36, 1  # PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG of <sys/prctl.h>
_NULL_DEVICE = os.makedev(1, 3)


@dataclass(frozen=True)
class Settings:
    """What a cluster is made of."""

    nodes: int = 4
    """Of the partition `main`, where jobs go by default."""
    spare_nodes: int = 0
    """Of the partition `spare`."""
    cpus: int = 4
    gpus: int = 4
    accounting: bool = True
    remembers_s: int = 3600
    """How long slurmctld knows a job that has ended (MinJobAge)."""


_GOES_ON = ("PENDING", "RUNNING", "COMPLETING")


@dataclass(frozen=True)
class Cluster:
    """A running cluster, as its users see it."""

    folder: Path
    settings: Settings

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {"SLURM_CONF": str(_conf(self.folder))}

    @property
    def nodes(self) -> list[str]:
        return _nodes(self.settings)

    def run(self, *arguments: str) -> str:
        """What a command of SLURM prints; AssertionError with what it says where it fails."""
        done = subprocess.run(
            arguments, env=os.environ | self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}{done.stdout}"
        return done.stdout

    def queue(self) -> dict[str, str]:
        """States of all jobs that wait or run, by id; those of an array one by one."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def requeues(self, job: str) -> int:
        """How often a job came back into the queue, by the controller: the accounting hears of it
        later, and of some ends never."""
        return int(self._told(job, "Restarts"))

    def end(self, job: str) -> tuple[str, str]:
        """(state, exit code) of a job that has left the queue, or is about to."""
        _until(f"the end of job {job}", lambda: self._told(job, "JobState") not in _GOES_ON)
        return self._told(job, "JobState"), self._told(job, "ExitCode")

    def accounted(self, job: str) -> str:
        """What sacct says of a job, a short while after it was so."""
        whole = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}")
        return self.run(*whole, "--format=State").strip()

    def _told(self, job: str, what: str) -> str:
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{what}="))


def missing(settings: Settings) -> str | None:
    """What this machine lacks to run such a cluster; None where it can."""
    wanted = (*CLIENTS, *DAEMONS, *(ACCOUNTING if settings.accounting else ()))
    lacking = [name for name in wanted if shutil.which(name, path=_SEARCHED) is None]
    if lacking:
        return f"SLURM ({', '.join(lacking)})"
    if os.geteuid() != 0:
        return "root, which starts SLURM's daemons,"
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(Path(folder) / "gpu", stat.S_IFCHR | 0o600, _NULL_DEVICE)
        except OSError:
            return "the right to make devices (mknod), which stand for GPUs,"
    return None


@contextmanager
def running(settings: Settings) -> Iterator[Cluster]:
    """A cluster of this machine; it ends with the block, and with this process."""
    folder = Path(tempfile.mkdtemp(prefix="sdx-slurm-"))  # sockets need a short path
    keeper = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder), json.dumps(asdict(settings))],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C at a terminal is for the tests, which close its input
    )
    with keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        try:
            said = keeper.stdout.readline()
            assert said == "ready\n", f"no SLURM cluster: {said}{keeper.stdout.read()}"
            yield Cluster(folder, settings)
        finally:
            keeper.stdin.close()
            keeper.wait()


def main() -> int:
    folder, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    libc = ctypes.CDLL(None)
    libc.prctl(_SUBREAPER, 1)  # what daemons leave behind becomes a child of this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        _start(folder, settings, lambda: libc.prctl(_DEATH_SIGNAL, signal.SIGKILL))
        print("ready", flush=True)
        sys.stdin.read()
    except _NotStarted as error:
        print(error, _logs(folder), sep="\n", flush=True)
        return 1
    finally:
        _end_children()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


class _NotStarted(Exception):
    """A daemon did not come; the text says which."""


def _start(folder: Path, settings: Settings, in_child: Callable[[], object]) -> None:
    for name in ("etc", "state", "log", "dev", *(f"spool/{node}" for node in _nodes(settings))):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    control, database, ledger, *slurmds = _free_ports(3 + len(_nodes(settings)))
    for number in range(settings.gpus):
        os.mknod(folder / "dev" / f"gpu{number}", stat.S_IFCHR | 0o600, _NULL_DEVICE)
    (folder / "etc" / "gres.conf").write_text(_gres_conf(folder, settings))
    text = _slurm_conf(folder, settings, control, ledger, slurmds)
    _conf(folder).write_text(text)
    environment = {"PATH": _SEARCHED, "SLURM_CONF": str(_conf(folder))}

    def begin(name: str, *arguments: str) -> None:
        with (folder / "log" / f"{name}.out").open("w") as output:
            subprocess.Popen(
                arguments,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=in_child,
            )

    def answers(*arguments: str) -> str | None:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None

    if settings.accounting:
        _start_accounting(folder, database, ledger, begin, answers)
    begin("slurmctld", "slurmctld", "-D")
    _until("slurmctld", lambda: answers("scontrol", "ping"))
    for node in _nodes(settings):
        begin(f"slurmd-{node}", "slurmd", "-D", "-N", node)
    idle = ["idle"] * len(_nodes(settings))
    _until("nodes", lambda: (answers("sinfo", "-h", "-N", "-o", "%t") or "").split() == idle)


def _start_accounting(
    folder: Path,
    database: int,
    ledger: int,
    begin: Callable[..., None],
    answers: Callable[..., str | None],
) -> None:
    """MariaDB in a folder of its own, slurmdbd on it, and the cluster known to that."""
    data, where = folder / "database", f"--socket={folder}/database.sock"
    made = subprocess.run(
        [
            shutil.which("mariadb-install-db", path=_SEARCHED) or "mariadb-install-db",
            "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
            "--auth-root-authentication-method=normal", "--innodb-log-file-size=8M",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if made.returncode:
        raise _NotStarted(f"mariadb-install-db: {made.stdout}{made.stderr}")
    begin(
        "mariadbd",
        "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", where,
        f"--pid-file={folder}/mariadbd.pid", "--bind-address=127.0.0.1", f"--port={database}",
        "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=8M",
        "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin",
    )  # fmt: skip
    client = ("mariadb", "--no-defaults", where, "--user=root", "--execute")
    _until("mariadbd", lambda: answers(*client, "select 1"))
    user = "slurm@'127.0.0.1'"
    statements = (
        "create database slurm_acct_db", f"create user {user} identified by 'slurm'",
        f"grant all on slurm_acct_db.* to {user}",
    )  # fmt: skip
    if answers(*client, "; ".join(statements)) is None:
        raise _NotStarted("mariadb: the database of slurmdbd could not be made")
    conf = folder / "etc" / "slurmdbd.conf"
    conf.write_text(_slurmdbd_conf(folder, database, ledger))
    conf.chmod(0o600)  # slurmdbd insists
    begin("slurmdbd", "slurmdbd", "-D")
    _until("slurmdbd", lambda: answers("sacctmgr", "-n", "list", "cluster") is not None)
    answers("sacctmgr", "-i", "add", "cluster", "sdx")


def _slurm_conf(
    folder: Path, settings: Settings, control: int, ledger: int, slurmds: Sequence[int]
) -> str:
    host = socket.gethostname().partition(".")[0]
    hardware = f"CPUs={settings.cpus} RealMemory=16000"
    if settings.gpus:
        hardware += f" Gres=gpu:{settings.gpus}"
    where = f"NodeHostname={host} NodeAddr=127.0.0.1"
    lines = [
        "ClusterName=sdx", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={control}",
        "SlurmUser=root", "SlurmdUser=root", "AuthType=auth/none", "CredType=cred/none",
        "AuthInfo=cred_expire=5",  # a requeued job waits so long; 120 by default, 5 at least
        "CommunicationParameters=NoCtldInAddrAny", f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n", f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid", f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SwitchType=switch/none",
        "JobAcctGatherType=jobacct_gather/none", "MpiDefault=none", "GresTypes=gpu",
        "ReturnToService=2", "SlurmdParameters=config_overrides", "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core", "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,"
        "batch_sched_delay=0",
        "JobRequeue=1", "KillWait=5", f"MinJobAge={settings.remembers_s}",
        # A loaded machine is slow to answer, which is not what the tests are about.
        "MessageTimeout=60", "BatchStartTimeout=120", "SlurmdTimeout=300",
        # The port where the processes of a job meet follows from its id: another in each cluster.
        f"FirstJobId={random.randrange(1000, 60000)}",
        *(
            f"NodeName={node} {where} Port={port} {hardware} State=UNKNOWN"
            for node, port in zip(_nodes(settings), slurmds, strict=True)
        ),
        f"PartitionName=main Nodes={','.join(_nodes(settings)[: settings.nodes])} Default=YES",
    ]  # fmt: skip
    if settings.spare_nodes:
        lines.append(f"PartitionName=spare Nodes={','.join(_nodes(settings)[settings.nodes :])}")
    if settings.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={ledger}",
        ]
    return "\n".join(lines) + "\n"


def _slurmdbd_conf(folder: Path, database: int, ledger: int) -> str:
    host = socket.gethostname().partition(".")[0]
    lines = [
        "AuthType=auth/none", f"DbdHost={host}", "DbdAddr=127.0.0.1", f"DbdPort={ledger}",
        "SlurmUser=root", f"LogFile={folder}/log/slurmdbd.log", f"PidFile={folder}/slurmdbd.pid",
        "StorageType=accounting_storage/mysql", "StorageHost=127.0.0.1",
        f"StoragePort={database}", "StorageUser=slurm", "StoragePass=slurm",
        "StorageLoc=slurm_acct_db",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _gres_conf(folder: Path, settings: Settings) -> str:
    files = [f"Name=gpu File={folder}/dev/gpu{number}" for number in range(settings.gpus)]
    return "\n".join(["AutoDetect=off", *files]) + "\n"


def _conf(folder: Path) -> Path:
    return folder / "etc" / "slurm.conf"


def _nodes(settings: Settings) -> list[str]:
    return [f"127.0.0.{number}" for number in range(1, settings.nodes + settings.spare_nodes + 1)]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that Linux gives to other programs."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 32000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            found += [port] if port not in found else []
    return found


def _until(what: str, is_there: Callable[[], object]) -> None:
    deadline = time.monotonic() + _STARTS_S
    while not is_there():
        if time.monotonic() > deadline:
            raise _NotStarted(f"{what}: not there after {_STARTS_S:.0f} s")
        time.sleep(0.1)


def _logs(folder: Path) -> str:
    """The last lines of every daemon."""
    files = sorted((folder / "log").glob("*"))
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in files)


def _end_children() -> None:
    """Kills all there is below this process, until nothing is: orphans become its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := children.read_text().split():
        for pid in map(int, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


if __name__ == "__main__":
    sys.exit(main())
