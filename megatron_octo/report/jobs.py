"""The Slurm jobs of runs: what `slurm/lib/job.sh` wrote of their starts, and what Slurm says of them now.

Of a job that has not started yet Slurm alone knows, and of its run by the comment that submitters give it: the folder.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_octo import rundir

OVER = ("done", "stopped", "failed", "resubmitted")
SQUEUE_FORMAT = "%A|%T|%r|%k"  # job, state, why it waits, comment
SQUEUE_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A run's last job."""

    job: int
    restart: int
    """How often it had been started before."""
    state: str
    """pending, running, requeued, resubmitted (it goes on as another job), done, stopped or failed; lost: Slurm has no
    such job, and it did not say its end: someone cancelled it, say."""
    reason: str

    def describe(self) -> str:
        """In words."""
        again = f", start {self.restart + 1}" if self.restart else ""
        return f"job {self.job}{again} {self.state}{f': {self.reason}' if self.reason else ''}"


def last_jobs() -> dict[Path, JobStatus]:
    """The last job of each run that has one, by the run's folder."""
    starts: dict[Path, tuple[int, int]] = {}
    for file in (rundir.runs_root() / "slurm").glob("*.*/run"):
        job, restart = map(int, file.parent.name.split("."))
        run = Path(file.read_text().strip())
        starts[run] = max((job, restart), starts.get(run, (0, 0)))
    now = queue()
    jobs = {run: _started(job, restart, now) for run, (job, restart) in starts.items()}
    for job, (state, reason, comment) in (now or {}).items():
        run = Path(comment)
        if run.is_absolute() and (run not in jobs or job > jobs[run].job):
            jobs[run] = JobStatus(job=job, restart=0, state=state, reason=reason if state == "pending" else "")
    return jobs


def _started(job: int, restart: int, queued: Mapping[int, tuple[str, str, str]] | None) -> JobStatus:
    file = rundir.runs_root() / "slurm" / f"{job}.{restart}" / "state"
    words = file.read_text() if file.exists() else "unknown"
    state, _, reason = words.strip().partition(" ")
    if queued is not None:
        now = queued[job][0] if job in queued else "lost"
        if state not in OVER or now == "pending":  # what was over someone has requeued
            state = now
    return JobStatus(job=job, restart=restart, state=state, reason=reason)


def queue() -> dict[int, tuple[str, str, str]] | None:
    """(state, why it waits, comment) of each job that Slurm has; None where it does not answer."""
    if shutil.which("squeue") is None:
        return None
    asked = ["squeue", "--noheader", f"--format={SQUEUE_FORMAT}"]
    try:
        run = subprocess.run(asked, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S, check=True)
    except subprocess.SubprocessError:
        return None
    rows = (line.split("|", 3) for line in run.stdout.splitlines())
    return {int(job): (state.lower(), reason, comment) for job, state, reason, comment in rows}
