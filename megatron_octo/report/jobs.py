"""Slurm jobs: what `slurm/lib/job.sh` wrote of their starts, and what Slurm says of them now.

Of a job that has not started yet Slurm alone knows, and of its run by the comment that submitters give it: the folder;
of a job without a run, a conversion say, the folder of all records.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_octo import rundir

OVER = ("done", "stopped", "failed", "resubmitted")
BETWEEN = ("completing", "requeued")  # Slurm's words of a job whose start has ended, and which it is to queue again
SQUEUE_FORMAT = "%A|%T|%r|%j|%k"  # job, state, why it waits, name, comment
SQUEUE_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """A job, by its last start."""

    job: int
    restart: int
    """How often it had been started before."""
    state: str
    """pending: it has not started yet. requeued: that start has ended, and it waits for the next. running, resubmitted
    (it goes on as another job), done, stopped or failed; lost: Slurm has no such job, and it did not say its end:
    someone cancelled it, say."""
    reason: str
    name: str
    """Slurm's."""
    argv: tuple[str, ...]
    """The arguments of `octo`, once the start has read them."""
    run: Path | None
    """The folder of its run; None for a job without one: of data, conversion, scores or a report, or a refused one."""

    def describe(self) -> str:
        """In words."""
        again = f", start {self.restart + 1}" if self.restart else ""
        return f"job {self.job}{again} {self.state}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """A job, as Slurm has it."""

    state: str
    waits_for: str
    """Slurm's word."""
    name: str
    comment: str


def records() -> Path:
    """The folder of what starts of jobs leave, each in JOB.RESTART/."""
    return rundir.runs_root() / "slurm"


def read_jobs() -> list[JobStatus]:
    """The jobs that have begun, and those that Slurm has for these runs, by number."""
    starts: dict[int, list[int]] = {}
    for folder in records().glob("*.*"):
        if re.fullmatch(r"\d+\.\d+", folder.name):
            job, restart = map(int, folder.name.split("."))
            starts.setdefault(job, []).append(restart)
    now = queue()
    jobs = {job: _started(job, restarts, now) for job, restarts in starts.items()}
    for job, queued in (now or {}).items():
        if job not in jobs and Path(queued.comment).is_absolute():
            jobs[job] = JobStatus(
                job=job,
                restart=0,
                state=queued.state,
                reason=queued.waits_for if queued.state == "pending" else "",
                name=queued.name,
                argv=(),
                run=_run(queued.comment),
            )
    return [jobs[job] for job in sorted(jobs)]


def last_jobs(jobs: Iterable[JobStatus]) -> dict[Path, JobStatus]:
    """The last job of each run that has one, by the run's folder."""
    return {each.run: each for each in jobs if each.run}


def jobs_alone(jobs: Iterable[JobStatus]) -> list[JobStatus]:
    """Those without a run: of several with one name and command the last, once the command is known or it is over."""
    alone = (each for each in jobs if not each.run)
    last = {(each.name, each.argv if each.argv or each.state in OVER else each.job): each for each in alone}
    return sorted(last.values(), key=lambda each: each.job)


def _started(job: int, restarts: Sequence[int], now: Mapping[int, Queued] | None) -> JobStatus:
    folders = {restart: records() / f"{job}.{restart}" for restart in sorted(restarts, reverse=True)}
    restart, folder = next(iter(folders.items()))
    said, _, reason = (_read(folder / "state") or "unknown").strip().partition(" ")
    queued = (now or {}).get(job)
    state = said
    match queued:
        case None:
            state = said if now is None or said in OVER else "lost"
        case Queued(state="pending", waits_for=why):  # itself, Slurm or someone requeued it, whatever it said before
            state, reason = "requeued", "; ".join(filter(None, (reason, f"waits for {why}" if why != "None" else "")))
        case Queued() if said == "requeued" and queued.state not in BETWEEN:  # the next start has said nothing yet
            restart, state, reason = restart + 1, queued.state, ""
        case Queued() if said not in (*OVER, "requeued"):
            state = queued.state
    named = re.search(r"\bJobName=(\S+)", _read(folder / "job.txt"))
    run = next(filter(None, (_read(each / "run").strip() for each in folders.values())), "")
    return JobStatus(
        job=job,
        restart=restart,
        state=state,
        reason=reason,
        name=queued.name if queued else named[1] if named else f"job {job}",
        argv=tuple(_read(folder / "argv").splitlines()),
        run=_run(run or (queued.comment if queued else "")),
    )


def _run(folder: str) -> Path | None:
    """The run that a job's record or comment names, if it names one."""
    run = Path(folder)
    return run if run.is_absolute() and run != records().absolute() else None


def _read(file: Path) -> str:
    """Empty for what is not there, or is not ours to read."""
    with contextlib.suppress(OSError):
        return file.read_text()
    return ""


def queue() -> dict[int, Queued] | None:
    """The jobs that Slurm has, by number; None where it does not answer."""
    if shutil.which("squeue") is None:
        return None
    asked = ["squeue", "--noheader", f"--format={SQUEUE_FORMAT}"]
    try:
        run = subprocess.run(asked, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S, check=True)
    except subprocess.SubprocessError:
        return None
    rows = (line.split("|", 4) for line in run.stdout.splitlines())
    return {
        int(job): Queued(state=state.lower(), waits_for=reason, name=name, comment=comment)
        for job, state, reason, name, comment in rows
    }
