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

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
GPUS = CPUS = 8
HOSTS = Path("/etc/hosts")
NULL_DEVICE = os.makedev(1, 3)
WAIT_S = 60.0


def missing() -> str:
    """Why there can be no Slurm here, empty if there can."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge"
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
            timeout=WAIT_S,
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
def cluster(folder: Path, *, nodes: int = 8) -> Iterator[Cluster]:
    """Start a Slurm, yield it, and stop it."""
    folder.mkdir(parents=True)
    started: list[Path] = []
    names = [f"node{number}" for number in range(1, nodes + 1)]
    line = f"127.0.0.1 {' '.join(names)} # {folder}\n"
    with HOSTS.open("a") as hosts:  # ranks meet at the first node by its name
        hosts.write(line)
    try:
        _write(folder, names)
        _munge(folder, started)
        clients = Cluster(folder=folder, nodes=nodes)
        clients("slurmctld", "-c")
        started.append(folder / "slurmctld.pid")
        for name in names:
            clients("slurmd", "-N", name)
            started.append(folder / f"slurmd.{name}.pid")
        end = time.monotonic() + WAIT_S
        while clients("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() != ["idle"] * nodes:
            assert time.monotonic() < end, clients("sinfo", "-R")
            time.sleep(0.1)
        yield clients
        clients("scancel", "--user", "root", check=False)
        while clients("squeue", "-h", check=False) and time.monotonic() < end + WAIT_S:
            time.sleep(0.2)
    finally:
        for file in reversed(started):
            _end(file)
        HOSTS.write_text(HOSTS.read_text().replace(line, ""))


def _munge(folder: Path, started: list[Path]) -> None:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    paths = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
    logs = {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
    options = [f"--{name}={path}" for name, path in (paths | logs).items()]
    subprocess.run(["munged", "--force", *options], check=True, timeout=WAIT_S)
    started.append(folder / "munged.pid")


def _write(folder: Path, names: list[str]) -> None:
    """slurm.conf, gres.conf and the device files of the GPUs."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(len(names) + 1)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        controller, *ports = [each.getsockname()[1] for each in sockets]
    host = socket.gethostname().partition(".")[0]
    for number in range(GPUS):
        os.mknod(folder / f"nvidia{number}", 0o20666, NULL_DEVICE)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-{GPUS - 1}]\n")
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=100000 "
        f"Gres=gpu:{GPUS} State=UNKNOWN"
        for name, port in zip(names, ports, strict=True)
    )
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
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
""")
    (folder / "state").mkdir()
    for name in names:
        (folder / "spool" / name).mkdir(parents=True)


def _end(file: Path) -> None:
    """End the daemon whose process id is in `file`, and wait for it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(file.read_text())
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + WAIT_S
        while Path("/proc", str(pid)).exists() and time.monotonic() < end:
            time.sleep(0.05)
