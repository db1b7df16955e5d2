"""What the folders under OCTO_RUNS say of themselves: how far each run is, and who descends from whom.

Reads few files, and asks Slurm once: a cluster's folder of hundreds of runs is listed in a moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_octo import lineage, rundir
from megatron_octo.budget.ledger import FILE as LEDGER
from megatron_octo.console import duration
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.lineage import Lineage
from megatron_octo.report.jobs import JobStatus, jobs_alone, last_jobs, read_jobs, records
from megatron_octo.report.load import METRICS
from megatron_octo.train.state import FILE as STATE
from megatron_octo.train.state import latest_save, saved_steps

TAIL_BYTES = 1 << 16  # of metrics.jsonl: enough rows for a pace
NOT_NODES = ("export",)  # another form of the weights above it


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """A run, as far as it is."""

    name: str
    folder: Path
    kind: str
    """train or rl, empty while it is not known; of a job without a run the command that it runs, else "job"."""
    state: str
    """running, done; stopped: by its end or by a kill; it would go on after `step`. new: it never saved, or has but a
    job yet. broken: see `fault`. Of a job without a run the job's."""
    step: int
    """Of a running one the last that it logged, else that of its last save."""
    num_steps: int
    tokens: int
    """Tokens that it has read then; 0 for RL."""
    train_tokens: int
    """Tokens that it is to read; 0 for RL."""
    eta_s: float | None
    """What is left at the pace of its last steps; of a running one."""
    descent: Lineage | None
    """Of its last weights; of a new one, of those that it starts from."""
    model: Path | None
    """Of RL: the folder of the model that it starts from."""
    job: JobStatus | None = None
    """Its last Slurm job."""
    fault: str = ""
    """Of a broken one, of which nothing else is known: which file cannot be read, and why."""

    @property
    def is_job(self) -> bool:
        """Whether it is no run but a job without one."""
        return self.kind not in ("train", "rl", "")

    def describe(self) -> str:
        """How far it is, in words."""
        if self.is_job:
            return self.job.describe() if self.job else ""
        at = f"at step {self.step:,} of {self.num_steps:,}"
        eta = f", eta {duration(self.eta_s)}" if self.eta_s is not None else ""
        words = {
            "new": "not saved yet",
            "running": f"running {at}{eta}",
            "stopped": f"stopped {at}",
            "done": "done",
            "broken": f"broken: {self.fault}",
        }
        job = f"; {self.job.describe()}" if self.job and self.state != "done" else ""
        return f"{words[self.state]}{job}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def read_runs(root: Path) -> list[RunStatus]:
    """The training and RL runs in `root`, by name, with those that a job is to begin; a broken one hides no other.

    After them the jobs without a run, by number.
    """
    known = read_jobs()
    jobs = last_jobs(known)
    names = {each.name for each in root.iterdir() if each.is_dir()} if root.is_dir() else set()
    names |= {run.name for run in jobs if run.parent == root.absolute()}
    found = (_read_or_broken(root / name, jobs) for name in sorted(names))
    return [*(run for run in found if run), *map(_job, jobs_alone(known))]


def read_run(folder: Path, jobs: Mapping[Path, JobStatus]) -> RunStatus | None:
    """The run in a folder, or the one that a job is to begin there; None if there is none.

    Raises:
        BadInput: a file is there but is not what its stage writes.
    """
    job = jobs.get(folder.absolute())
    config = rundir.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if {"budget", "learning_rate"} <= config.keys():
        return replace(_training(folder, config), job=job)
    if {"prompts", "output"} <= config.keys():
        return replace(_rl(folder, config), job=job)
    return replace(_unknown(folder, "new"), job=job) if job and not config else None


def _read_or_broken(folder: Path, jobs: Mapping[Path, JobStatus]) -> RunStatus | None:
    try:
        return read_run(folder, jobs)
    except (OctoError, OSError, TypeError, ValueError, LookupError, AttributeError) as error:  # whatever JSON may hold
        fault = (
            error.what if isinstance(error, OctoError) else f"a file in {folder} is not what a stage writes: {error!r}"
        )
        return replace(_unknown(folder, "broken"), fault=fault)


def _job(job: JobStatus) -> RunStatus:
    """A row for a job without a run."""
    folder = records() / f"{job.job}.{job.restart}"
    kind = job.argv[0] if job.argv else "job"
    return replace(_unknown(folder, job.state), name=job.name, kind=kind, job=job)


def _unknown(folder: Path, state: str) -> RunStatus:
    """A run that says nothing of itself."""
    return RunStatus(
        name=folder.name,
        folder=folder,
        kind="",
        state=state,
        step=0,
        num_steps=0,
        tokens=0,
        train_tokens=0,
        eta_s=None,
        descent=None,
        model=None,
    )


def find_run(name: str) -> RunStatus:
    """The run of that name, or in that folder; else the last job without a run of that name or number.

    Raises:
        BadInput: there is none.
    """
    jobs = read_jobs()
    for folder in (rundir.run_folder(name), Path(name)):
        if run := read_run(folder, last_jobs(jobs)):
            return run
    for job in reversed(jobs):
        if not job.run and name in (job.name, str(job.job)):
            return _job(job)
    known = ", ".join(run.name for run in read_runs(rundir.runs_root()))
    raise BadInput(f"no run {name!r} in {rundir.runs_root()}", fix=f"there are: {known or 'none'}")


def forest(runs: Sequence[RunStatus]) -> dict[str, Any]:
    """The descent of the runs as nested lines: {line: {line of a child: {...}}}."""
    runs = [run for run in runs if not run.is_job]
    status = {run.name: run for run in runs}
    parents: dict[str, tuple[str, str]] = {}  # of each node: its parent, and what that had read when it left
    for run in sorted(runs, key=lambda run: run.state == "broken"):
        for node, parent, after in _links(run, status):
            known = node == run.name and run.state != "broken"  # of a run itself, its own folder knows
            if known or node not in parents:
                parents[node] = parent, after

    def below(parent: str) -> dict[str, Any]:
        return {
            _line(node, after, status.get(node)): below(node)
            for node, (above, after) in parents.items()
            if above == parent
        }

    return below("")


def saves(run: RunStatus) -> list[dict[str, int]]:
    """The whole saves of a training run: {step, tokens}, in order."""
    states = [rundir.read_json(rundir.step_folder(run.folder, step) / STATE) for step in saved_steps(run.folder)]
    return [{name: state[name] for name in ("step", "tokens")} for state in states]


def ledger(run: RunStatus) -> list[dict[str, Any]]:
    """The ledger in a training run's last save, a row a source."""
    last = latest_save(run.folder)
    sources: list[dict[str, Any]] = rundir.read_json(last / LEDGER)["sources"] if last else []
    return sources


def _training(folder: Path, config: Mapping[str, Any]) -> RunStatus:
    budget, rows = config["budget"], _tail(folder / METRICS)
    batch_tokens = budget["batch_sequences"] * config["data"]["seq_length"]
    num_steps, saved = budget["train_tokens"] // batch_tokens, max(saved_steps(folder), default=0)
    state = _state(folder, saved)
    step = num_steps if state == "done" else rows[-1]["step"] if state == "running" and rows else saved
    return RunStatus(
        name=config["name"],
        folder=folder,
        kind="train",
        state=state,
        step=step,
        num_steps=num_steps,
        tokens=step * batch_tokens,
        train_tokens=budget["train_tokens"],
        eta_s=_eta_s(rows, num_steps) if state == "running" else None,
        descent=lineage.read_if_present(folder),
        model=None,
    )


def _rl(folder: Path, config: Mapping[str, Any]) -> RunStatus:
    rows = _tail(folder / METRICS)
    step = int(rows[-1]["step"]) if rows else 0
    state = _state(folder, step)
    return RunStatus(
        name=config["name"],
        folder=folder,
        kind="rl",
        state=state,
        step=step,
        num_steps=config["num_steps"],
        tokens=0,
        train_tokens=0,
        eta_s=_eta_s(rows, config["num_steps"]) if state == "running" else None,
        descent=lineage.read_if_present(folder / "hf"),
        model=Path(config["model"]),
    )


def _state(folder: Path, step: int) -> Literal["new", "running", "stopped", "done"]:
    if rundir.in_use(folder):
        return "running"
    if rundir.is_done(folder):
        return "done"
    return "stopped" if step else "new"


def _eta_s(rows: Sequence[Mapping[str, Any]], num_steps: int) -> float | None:
    """Time for the steps after the last row, at the mean pace of the rows."""
    if len(rows) < 2:
        return None
    first, last = rows[0], rows[-1]
    pace = (last["time_s"] - first["time_s"]) / max(1, last["step"] - first["step"])
    return float(pace * (num_steps - last["step"]))


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a file of JSON lines; one that is cut off, or still being written, is left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    whole = lines[1 if size > TAIL_BYTES else 0 : -1]
    return [json.loads(line) for line in whole]


def _links(run: RunStatus, status: Mapping[str, RunStatus]) -> Iterator[tuple[str, str, str]]:
    """(node, its parent, what that had read when it left) from the oldest ancestor down to the run."""
    node = after = ""
    for link in run.descent.chain() if run.descent else ():
        if link.kind not in NOT_NODES:
            named = link.kind in ("train", "rl")
            parent, node = node, link.name if named else f"{link.name} ({link.kind} {link.weights_sha256[:12]})"
            yield node, parent, after
            after = f"after {link.tokens:,} tokens" if link.kind == "train" else ""
    if run.descent is None:  # RL that has written no model yet
        above = (each.name for each in status.values() if run.model and each.folder in run.model.parents)
        yield run.name, next(above, ""), ""


def _line(node: str, after: str, run: RunStatus | None) -> str:
    if run is None:
        return node
    read = f"{run.tokens:,} tokens" if run.tokens else ""
    return "  ".join(filter(None, (node, after, run.kind, run.describe(), read)))
