"""What the report shows, read from run folders alone; a piece that is not there yet becomes a note.

Which folders those are, `source.py` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_octo import lineage, rundir, stage_log
from megatron_octo.config.base import to_dict
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import FromRun, MidTrainConfig
from megatron_octo.errors import BadInput
from megatron_octo.evaluate.run import SCORES, Scores, read_scores
from megatron_octo.evaluate.statistics import paired_difference
from megatron_octo.lineage import Lineage
from megatron_octo.report.source import BranchSource, Source
from megatron_octo.rl.follow import roll_backs
from megatron_octo.stage_log import StageCost

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Where an RL run goes on otherwise than before."""

    after_step: int
    """A rollout step."""
    roll_back: bool
    """It went back to this step; otherwise longer responses begin."""
    text: str
    """In words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A training or RL run: its settings and what it logged so far."""

    name: str
    label: str
    """Short name for figures."""
    folder: Path
    done: bool
    num_steps: int
    """Steps that it is to make."""
    start_tokens: int = 0
    """Tokens that its parents trained on before it."""
    rows: tuple[dict[str, float], ...] = ()
    """metrics.jsonl, a row a step, ascending."""
    settings: dict[str, Any]
    descent: Lineage | None = None
    """Of its last weights."""
    turns: tuple[Turn, ...] = ()
    """Of an RL run, as far as it is."""

    def curve(self, metric: str, x: str) -> tuple[list[float], list[float]]:
        """(`x`, `metric`) of the rows that have both; `tokens` counts from the stable stage's start."""
        rows = [row for row in self.rows if metric in row and x in row]
        shift = self.start_tokens if x == "tokens" else 0
        return [row[x] + shift for row in rows], [row[metric] for row in rows]

    @property
    def status(self) -> str:
        """How far it is."""
        if self.done:
            return "done"
        return f"step {self.rows[-1]['step']:,.0f} of {self.num_steps:,}" if self.rows else "not started"


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A decay branch and what RL made of it."""

    train: Run
    rl: Run | None
    before: Scores | None
    after: Scores | None
    gain: tuple[float, float, float] | None
    """Accuracy after minus before: (difference, low, high) of the 95% interval, paired over problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that the page shows."""

    title: str
    stable: Run | None
    stable_scores: Scores | None
    branches: tuple[Branch, ...]
    costs: tuple[StageCost, ...]
    notes: tuple[str, ...]
    """What is missing, a sentence each."""


def load(source: Source) -> Report:
    """Read the folders. A missing piece is left out and noted.

    Raises:
        BadInput: a file is there but is not what its stage writes.
    """
    notes: list[str] = []
    labels = _labels([each.train.name for each in source.branches])
    stable = _train_run(source.stable, "stable", 0, notes) if source.stable else None
    branches = tuple(
        _branch(each, label, _start_tokens(source.stable, each.train), notes)
        for each, label in zip(source.branches, labels, strict=True)
    )
    stable_scores = _scores(source.stable_scores, "the stable model", notes) if stable else None
    costs = tuple(stage_log.costs(source.pipeline)) if source.pipeline else ()
    if not costs:
        notes.append("No times of stages: `octo pipeline` writes them.")
    return Report(
        title=source.title,
        stable=stable,
        stable_scores=stable_scores,
        branches=branches,
        costs=costs,
        notes=tuple(notes),
    )


def best(report: Report) -> list[Branch]:
    """The branches by accuracy, the best first: after RL where any branch has that, else before."""
    after = [branch for branch in report.branches if branch.after]
    if after:
        return sorted(after, key=lambda branch: -branch.after.accuracy if branch.after else 0.0)
    before = [branch for branch in report.branches if branch.before]
    return sorted(before, key=lambda branch: -branch.before.accuracy if branch.before else 0.0)


def compare(first: Scores | None, second: Scores | None) -> tuple[float, float, float] | None:
    """`second` - `first`, paired; None where one is missing or the problems are not the same."""
    if first is None or second is None or first.problems_sha256 != second.problems_sha256:
        return None
    return paired_difference(first.per_problem, second.per_problem)


def _start_tokens(stable: MidTrainConfig | None, train: MidTrainConfig) -> int:
    """Tokens that the stable stage trained on where `train` left it; 0 where it is not part of the report."""
    if stable is None:
        return 0
    start = train.start
    if not isinstance(start, FromRun) or not start.names_save:
        return stable.budget.train_tokens
    return start.tokens if start.tokens is not None else (start.step or 0) * stable.batch_tokens


def _branch(source: BranchSource, label: str, start: int, notes: list[str]) -> Branch:
    train = _train_run(source.train, label, start, notes)
    rl = _rl_run(source.rl, label, notes) if source.rl else None
    if rl is None:
        notes.append(f"Branch {label} has no RL run.")
    before = _scores(source.before, f"branch {label} before RL", notes)
    after = _scores(source.after, f"branch {label} after RL", notes) if rl and rl.rows else None
    if before and after and before.problems_sha256 != after.problems_sha256:
        notes.append(f"Branch {label} was scored on other problems after RL than before: no paired difference.")
    return Branch(train=train, rl=rl, before=before, after=after, gain=compare(before, after))


def _train_run(config: MidTrainConfig, label: str, start: int, notes: list[str]) -> Run:
    folder = rundir.run_folder(config.name)
    exports = sorted(folder.glob("hf/*step_*/"), key=lambda export: export.name.rpartition("step_")[2])
    descent = next(filter(None, (lineage.read_if_present(each) for each in (*exports[-1:], folder))), None)
    return _run(config, label, folder, notes, start=start, descent=descent, what=f"Training of {label}")


def _rl_run(config: RLConfig, label: str, notes: list[str]) -> Run:
    descent = lineage.read_if_present(config.output / "hf")
    run = _run(config, label, config.output, notes, start=0, descent=descent, what=f"RL of branch {label}")
    return replace(run, turns=tuple(_turns(run)))


def _turns(run: Run) -> Iterator[Turn]:
    updates = run.settings["updates_per_step"]
    for longer in run.settings["longer_responses"]:
        if run.rows and longer["after_step"] < run.rows[-1]["step"]:
            step, tokens = longer["after_step"], longer["max_response_tokens"]
            text = f"up to {tokens:,} tokens after step {step:,} ({step * updates:,} updates)"
            yield Turn(after_step=step, roll_back=False, text=text)
    for back in roll_backs(run.folder):
        text = f"back from step {back['step']:,} to {back['to']:,} ({back['to'] * updates:,} updates): {back['what']}"
        yield Turn(after_step=back["to"], roll_back=True, text=text)


def _run(
    config: MidTrainConfig | RLConfig,
    label: str,
    folder: Path,
    notes: list[str],
    *,
    start: int,
    descent: Lineage | None,
    what: str,
) -> Run:
    own = folder / "config.json"
    run = Run(
        name=config.name,
        label=label,
        folder=folder,
        done=rundir.is_done(folder),
        num_steps=config.num_steps,
        start_tokens=start,
        rows=tuple(_read_metrics(folder / METRICS)),
        settings=rundir.read_json(own) if own.exists() else to_dict(config),
        descent=descent,
    )
    if not run.rows:
        notes.append(f"{what} has not run yet: {folder / METRICS} is not there or is empty.")
    elif not run.done:
        notes.append(f"{what} is not finished: {run.status}.")
    return run


def _scores(folder: Path | None, what: str, notes: list[str]) -> Scores | None:
    if folder is not None and (folder / SCORES).exists():
        return read_scores(folder)
    notes.append(f"No scores of {what} yet." if folder else f"No evaluation of {what} is planned.")
    return None


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl by step; of a step made again after a restart, the last."""
    rows = {int(row["step"]): row for row in _read_lines(path) if "step" in row}
    return [rows[step] for step in sorted(rows)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a last line that is still being written is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise BadInput(f"{path}:{number} is not JSON: {error}", fix="remove the line") from None
    return rows


def _labels(names: list[str]) -> list[str]:
    """The names without the words that all of them begin with."""
    if len(names) < 2:
        return names
    words = [name.split("-") for name in names]
    shared = 0
    while all(len(each) > shared + 1 for each in words) and len({each[shared] for each in words}) == 1:
        shared += 1
    return ["-".join(each[shared:]) for each in words]
