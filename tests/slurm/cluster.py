"""A real Slurm on this machine: one controller, and a slurmd for each virtual node with eight fake GPUs.

It needs no systemd, no cgroups and nothing in /etc/slurm; it needs root, for device files and node names. Everything
lies in one folder, and is stopped by the process ids in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
ACCOUNTING = ("slurmdbd", "sacct", "mariadbd", "mariadb-install-db")
GPUS = CPUS = 8
HOSTS = Path("/etc/hosts")
NULL_DEVICE = os.makedev(1, 3)
WAIT_S = 60.0


def missing(*, accounting: bool = False) -> str:
    """Why there can be no Slurm here, empty if there can."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
    if accounting and (absent := [name for name in ACCOUNTING if shutil.which(name) is None]):
        return f"{', '.join(absent)} not installed: apt-get install slurmdbd mariadb-server"
    return "" if os.geteuid() == 0 else "virtual nodes with fake GPUs need root"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running Slurm."""

    folder: Path
    nodes: int

    @property
    def environment(self) -> dict[str, str]:
        """What its clients need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __call__(self, *argv: object, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run a client; returns what it printed."""
        run = subprocess.run(
            list(map(str, argv)),
            env={**os.environ, **self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or run.returncode == 0, f"{argv}: {run.stdout}{run.stderr}"
        return (run.stdout + run.stderr).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.field(job, "JobState")

    def processes(self, job: str) -> Iterator[tuple[int, list[str], str]]:
        """(id, command line, node) of all that the job has started."""
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found, env = (each.pid, each.cmdline()), each.environ()
                if (env.get("SLURM_JOB_ID"), env.get("SLURM_CONF")) == (job, self.environment["SLURM_CONF"]):
                    yield *found, env.get("SLURMD_NODENAME", "")

    def hurry(self, job: str) -> None:
        """Let a requeued job start in a moment: Slurm would wait two minutes.

        Not at once: slurmd takes no credential of the second in which it revoked the last one.
        """
        start = datetime.fromisoformat(self.field(job, "StartTime")) if self.state(job) == "PENDING" else None
        if start and start - datetime.now() > timedelta(seconds=10):
            self("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)

    def wait(self, job: str, until: Callable[[], bool], timeout_s: float = 300.0) -> None:
        """Wait until `until` holds, hurrying the job on."""
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, self("scontrol", "show", "job", job)
            with contextlib.suppress(ValueError):  # a start that is not known yet
                self.hurry(job)
            time.sleep(0.3)

    def wait_end(self, job: str, timeout_s: float = 300.0) -> str:
        """Wait until the job has ended for good; returns its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait(job, lambda: self.state(job) in ended, timeout_s)
        return self.state(job)


@contextlib.contextmanager
def cluster(folder: Path, *, nodes: int = 8, accounting: bool = False) -> Iterator[Cluster]:
    """Start a Slurm, yield it, and stop it. With `accounting` it keeps a database of its jobs, which `sacct` shows."""
    folder.mkdir(parents=True)
    names = [f"node{number}" for number in range(1, nodes + 1)]
    line = f"127.0.0.1 {' '.join(names)} # {folder}\n"
    with contextlib.ExitStack() as started:
        started.callback(lambda: HOSTS.write_text(HOSTS.read_text().replace(line, "")))
        with HOSTS.open("a") as hosts:  # ranks meet at the first node by its name
            hosts.write(line)
        _write(folder, names, accounting=accounting)
        _munge(folder)
        started.callback(_end, folder / "munged.pid")
        clients = Cluster(folder=folder, nodes=nodes)
        if accounting:
            started.enter_context(_database(folder))
            clients("slurmdbd", MYSQL_UNIX_PORT=str(folder / "database" / "sock"))
            started.callback(_end, folder / "slurmdbd.pid")
            wait_for(lambda: "Adding" in clients("sacctmgr", "--immediate", "add", "cluster", "local", check=False))
        clients("slurmctld", "-c")
        started.callback(_end, folder / "slurmctld.pid")
        started.callback(_end, *(folder / f"slurmd.{name}.pid" for name in names))
        for name in names:
            clients("slurmd", "-N", name)
        idle = ["idle"] * nodes
        wait_for(lambda: clients("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() == idle)
        yield clients
        clients("scancel", "--user", "root", check=False)
        wait_for(lambda: not clients("squeue", "-h", check=False))


def wait_for(what: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Wait until `what` holds."""
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"not after {timeout_s} s"
        time.sleep(0.1)


def _munge(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    paths = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
    logs = {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
    options = [f"--{name}={path}" for name, path in (paths | logs).items()]
    subprocess.run(["munged", "--force", *options], check=True, timeout=WAIT_S)


@contextlib.contextmanager
def _database(folder: Path) -> Iterator[None]:
    """MariaDB for slurmdbd, on no port: root enters by its socket without a password."""
    data = folder / "database"
    data.mkdir()
    shutil.chown(data, "mysql")
    options = ["--no-defaults", "--user=mysql", f"--datadir={data}"]
    install = ["mariadb-install-db", *options, "--auth-root-authentication-method=socket", "--skip-test-db"]
    subprocess.run(install, check=True, capture_output=True, timeout=WAIT_S)
    socket_file, log = data / "sock", folder / "mariadbd.log"
    serve = ["mariadbd", *options, "--skip-networking", f"--socket={socket_file}", f"--pid-file={data}/pid"]
    with log.open("w") as output, subprocess.Popen(serve, stdout=output, stderr=output) as database:
        try:
            wait_for(socket_file.exists)
            yield
        finally:
            database.terminate()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _write(folder: Path, names: list[str], *, accounting: bool) -> None:
    """slurm.conf, slurmdbd.conf, gres.conf and the device files of the GPUs."""
    controller, accountant, *ports = free_ports(len(names) + 2)
    host = socket.gethostname().partition(".")[0]
    for number in range(GPUS):
        os.mknod(folder / f"nvidia{number}", 0o20666, NULL_DEVICE)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-{GPUS - 1}]\n")
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=100000 "
        f"Gres=gpu:{GPUS} State=UNKNOWN"
        for name, port in zip(names, ports, strict=True)
    )
    storage = "AccountingStorageType=accounting_storage/none"
    if accounting:
        storage = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accountant}
AccountingStoragePass={folder}/munge.sock"""
        (folder / "slurmdbd.conf").touch(mode=0o600)  # else slurmdbd refuses it
        (folder / "slurmdbd.conf").write_text(f"""\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accountant}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
""")
    (folder / "slurm.conf").write_text(f"""\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
CompleteWait=0
MinJobAge=3600
InactiveLimit=0
{storage}
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
""")
    (folder / "state").mkdir()
    for name in names:
        (folder / "spool" / name).mkdir(parents=True)


def _end(*files: Path) -> None:
    """End the daemons whose process ids are in `files`, and wait for them."""
    processes = []
    for file in files:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(file.read_text())
            os.kill(pid, signal.SIGTERM)
            processes.append(Path("/proc", str(pid)))
    wait_for(lambda: not any(each.exists() for each in processes))
