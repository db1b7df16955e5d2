"""Which folders a report reads: those of a pipeline, or of runs that are named one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_octo import rundir
from megatron_octo.config.base import from_dict
from megatron_octo.config.evaluate import EvaluateConfig
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import FromRun, MidTrainConfig
from megatron_octo.errors import BadInput
from megatron_octo.evaluate.run import SCORES


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchSource:
    """The folders of one branch; None where the branch has no such stage."""

    train: MidTrainConfig
    before: Path | None
    """Its scores before RL."""
    rl: RLConfig | None
    after: Path | None
    """Its scores after RL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The folders of one report."""

    title: str
    pipeline: Path | None
    """Where the pipeline's stage times are."""
    stable: MidTrainConfig | None
    stable_scores: Path | None
    branches: tuple[BranchSource, ...]


def of_pipeline(config: PipelineConfig) -> Source:
    """The folders of a pipeline."""
    return Source(
        title=config.name,
        pipeline=rundir.run_folder(config.name),
        stable=config.stable,
        stable_scores=_scores_of(config.evaluate_before, rundir.run_folder(config.stable.name)),
        branches=tuple(_branch_source(config, train) for train in config.branches),
    )


def of_runs(folders: Sequence[Path]) -> Source:
    """The folders of separate runs: at most one stable stage, its branches, RL runs of these.

    Raises:
        BadInput: a folder is no run, an RL run starts from none of the branches, or a branch has two.
    """
    trains: list[MidTrainConfig] = []
    rls: list[RLConfig] = []
    for folder in folders:
        settings = _read_run(folder)
        if isinstance(settings, RLConfig):
            rls.append(settings)
        else:
            trains.append(settings)
    stables = [each for each in trains if not isinstance(each.start, FromRun)]
    if len(stables) > 1:
        raise BadInput(
            f"{len(stables)} stable runs at once: {', '.join(each.name for each in stables)}",
            fix="one report shows one stable stage and its branches",
        )
    branches = tuple(_with_rl(train, rls) for train in trains if isinstance(train.start, FromRun))
    lost = [rl.name for rl in rls if not any(each.rl is rl for each in branches)]
    if lost:
        raise BadInput(f"RL run {lost[0]} starts from none of the runs given", fix="give its branch's run too")
    stable = stables[0] if stables else None
    return Source(
        title=", ".join(each.name for each in folders),
        pipeline=None,
        stable=stable,
        stable_scores=_only_scores(rundir.run_folder(stable.name)) if stable else None,
        branches=branches,
    )


def _with_rl(train: MidTrainConfig, rls: Sequence[RLConfig]) -> BranchSource:
    """A branch with the one of `rls` that starts from it."""
    run = rundir.run_folder(train.name)
    mine = [each for each in rls if _inside(each.model, run)]
    if len(mine) > 1:
        raise BadInput(f"two RL runs of branch {train.name}: {mine[0].name}, {mine[1].name}", fix="give one of them")
    rl = mine[0] if mine else None
    return BranchSource(train=train, before=_only_scores(run), rl=rl, after=_only_scores(rl.output) if rl else None)


def _branch_source(config: PipelineConfig, train: MidTrainConfig) -> BranchSource:
    run = rundir.run_folder(train.name)
    rl = next((each for each in config.rl if _inside(each.model, run)), None)
    after = _scores_of(config.evaluate_after, rl.output) if rl and config.evaluate_after else None
    return BranchSource(train=train, before=_scores_of(config.evaluate_before, run), rl=rl, after=after)


def _scores_of(evaluation: EvaluateConfig, run: Path) -> Path | None:
    """The scores folder of the model that lies in `run`."""
    return next((each.output for each in evaluation.models if _inside(each.model, run)), None)


def _only_scores(run: Path) -> Path | None:
    found = sorted(path.parent for path in run.glob(f"scores/*/{SCORES}"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BadInput(f"{run} has scores of {len(found)} tasks: {names}", fix="give the pipeline's recipe instead")
    return found[0] if found else None


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))  # noqa: PTH100 (links stay unresolved)


def _read_run(folder: Path) -> MidTrainConfig | RLConfig:
    path = folder / "config.json"
    value = rundir.read_json(path)
    keys = set(value) if isinstance(value, dict) else set()
    if {"prompts", "output"} <= keys:
        return from_dict(RLConfig, value, origin=str(path))
    if not {"budget", "learning_rate"} <= keys:
        raise BadInput(f"{folder} is neither a training nor an RL run", fix="give run folders, or a pipeline's recipe")
    train = from_dict(MidTrainConfig, value, origin=str(path))
    if rundir.run_folder(train.name).resolve() != folder.resolve():
        raise BadInput(f"{folder} is not run {train.name} of {rundir.runs_root()}", fix="set OCTO_RUNS to its parent")
    return train
