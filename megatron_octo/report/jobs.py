"""The Slurm job of a run: what `slurm/lib/job.sh` wrote of its last start, and what Slurm says of it now."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_octo import rundir

OVER = ("done", "stopped", "failed")
SQUEUE_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A run's last job."""

    job: int
    restart: int
    """How often it had been started before."""
    state: str
    """pending, running, requeued, done, stopped or failed; lost: Slurm has no such job, and it did not say its end."""
    reason: str

    def describe(self) -> str:
        """In words."""
        again = f", start {self.restart + 1}" if self.restart else ""
        return f"job {self.job}{again} {self.state}{f': {self.reason}' if self.reason else ''}"


def last_job(run: Path) -> JobStatus | None:
    """The last job that ran `run`, None if none did."""
    starts = [
        tuple(map(int, file.parent.name.split(".")))
        for file in (rundir.runs_root() / "slurm").glob("*.*/run")
        if file.read_text().strip() == str(run.absolute())
    ]
    if not starts:
        return None
    job, restart = max(starts)
    words = (rundir.runs_root() / "slurm" / f"{job}.{restart}" / "state").read_text()
    state, _, reason = words.strip().partition(" ")
    if state not in OVER and shutil.which("squeue"):
        state = _now(job) or ("lost" if state == "running" else state)
    return JobStatus(job=job, restart=restart, state=state, reason=reason)


def _now(job: int) -> str:
    """What Slurm calls its state, empty if it knows no such job."""
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        run = subprocess.run(asked, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return run.stdout.strip().lower()
