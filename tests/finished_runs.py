"""Run folders of the miniature as its stages leave them, with made-up numbers; for tests of what reads them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo import checksums, lineage, rundir, stage_log
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.evaluate.run import Scores
from megatron_octo.evaluate.statistics import accuracy_interval
from megatron_octo.lineage import Lineage
from megatron_octo.train.state import TrainState

RECIPE = Path(__file__).parent.parent / "recipes" / "miniature.py"
PROBLEMS = 400
BEFORE = {"stable": 0.25, "short": 0.32, "long": 0.22, "hybrid": 0.26}
AFTER = {"short": 0.70, "long": 0.76, "hybrid": 0.62}


def pipeline() -> PipelineConfig:
    """The miniature, in OCTO_RUNS."""
    return load_recipe(f"{RECIPE}:pipeline", PipelineConfig)


def write_runs(config: PipelineConfig, *, rl: bool = True) -> None:
    """Every folder that a report reads; with `rl` False, those of a pipeline that stopped before RL."""
    base = Lineage(name="random-base", kind="base", weights_sha256="ba5e" * 16)
    imported = Lineage(name="random-base", kind="import", weights_sha256="1a" * 32, parent=base)
    stable = write_training(config.stable, imported, "stable", at=0.0, seed=0)
    for index, (branch, rl_config) in enumerate(zip(config.branches, config.rl, strict=True)):
        label = branch.name.rsplit("-", 1)[-1]
        export = write_training(branch, stable, label, at=1.0, seed=index + 1)
        if rl:
            write_rl(rl_config, export, label, seed=index)
    times = {
        "generate corpora": (4.2, 0.2),
        f"train {config.stable.name}": (171.0, 1.9),
        "evaluate before RL": (80, 2.3),
    }
    times |= {"reinforcement learning": (560.0, 6.8)} if rl else {}
    second = {f"train {config.stable.name}": (9.0, 1.5)}
    for started, (name, (seconds, peak)) in enumerate([*times.items(), *second.items()]):
        attempt = stage_log.Attempt(stage=name, started=started, seconds=seconds, peak_gib=peak)
        stage_log.record(rundir.run_folder(config.name), attempt)


def write_stable_saves(name: str, *steps: int) -> None:
    """A finished run of the miniature's stable stage with saves after `steps`, apart from weights."""
    config = load_recipe(f"{RECIPE}:stable", MidTrainConfig)
    for step in steps:
        save = rundir.step_folder(rundir.run_folder(name), step)
        rundir.write_json(save / "model.json", to_dict(config.model))
        TrainState(step=step, tokens=step * config.batch_tokens).write(save)
        checksums.seal(save, {})
    rundir.mark_done(rundir.run_folder(name))


def write_training(config: MidTrainConfig, parent: Lineage, label: str, *, at: float, seed: int) -> Lineage:
    """A finished training run with its export and its scores before RL; returns the export's lineage."""
    folder, draw = rundir.run_folder(config.name), np.random.default_rng(seed)
    rows = []
    for step in range(1, config.num_steps + 1):
        done = step / config.num_steps
        loss = 1.2 + 4 * math.exp(-9 * (done + at)) - 0.12 * at * done + 0.06 * float(draw.standard_normal())
        rate = 2e-3 if at == 0 else 2e-4 + 0.9e-3 * (1 + math.cos(math.pi * done))
        rows.append(
            {
                "step": step,
                "tokens": step * config.batch_tokens,
                "train/loss": loss,
                "optim/lr": rate,
                "optim/grad_norm": 0.8,
                "throughput/tokens_per_second": 14_000.0,
                "time_s": step * 0.07,
            }
        )
    write_lines(folder / "metrics.jsonl", rows)
    rundir.write_json(folder / "config.json", to_dict(config))
    run = Lineage(
        name=config.name,
        kind="train",
        weights_sha256=f"{seed:02x}" * 32,
        step=config.num_steps,
        tokens=config.budget.train_tokens,
        parent=parent,
    )
    lineage.write(folder, run)
    rundir.mark_done(folder)
    export = Lineage(name=config.name, kind="export", weights_sha256="e0" * 32, step=config.num_steps, parent=run)
    lineage.write(folder / "hf" / f"step_{config.num_steps:08d}", export)
    write_scores(folder / "scores" / "heldout", BEFORE[label], tokens=55.0 if label == "long" else 25.0, seed=seed)
    return export


def write_rl(config: RLConfig, parent: Lineage, label: str, *, seed: int) -> None:
    """A finished RL run and its scores."""
    draw = np.random.default_rng(seed)
    rows = []
    for step in range(1, config.num_steps + 1):
        share = (
            BEFORE[label] + (AFTER[label] - BEFORE[label]) * (1 - math.exp(-step / 10)) + 0.03 * draw.standard_normal()
        )
        rows.append(
            {
                "step": step,
                "rl/updates": step * config.updates_per_step,
                "rl/reward_mean": 2 * share - 1,
                "rl/accuracy": share,
                "rl/response_length_mean": 30.0 + (25 - step / 2 if label == "long" else step / 8),
                "rl/right_length_mean": 28.0 + (20 - step / 2 if label == "long" else step / 8),
                "rl/wrong_length_mean": 34.0 + (30 - step / 2 if label == "long" else step / 8),
                "rl/truncated_share": 0.0,
                "rl/boxed_at_start_share": 0.01 * (1 + math.sin(step)),
                "rl/repetition_share": 0.02 + 0.01 * math.cos(step),
                "rl/entropy": 0.2 + 0.3 * math.exp(-step / 12),
                "rl/clip_share": 0.004 + 0.002 * math.sin(step / 2),
                "rl/vllm_kl": 1e-4 * (1 + float(draw.random())) * (-1) ** step,
                "rl/most_vllm_kl": 1e-3,
                "optim/grad_norm": 0.3 + 0.1 * math.sin(step),
                "time_s": 20.0 + 4 * step,
            }
        )
    write_lines(config.output / "metrics.jsonl", rows)
    rundir.write_json(config.output / "config.json", to_dict(config))
    rundir.mark_done(config.output)
    lineage.write(
        config.output / "hf",
        Lineage(name=config.name, kind="rl", weights_sha256=f"f{seed}" * 32, step=config.num_steps, parent=parent),
    )
    write_scores(config.output / "scores" / "heldout", AFTER[label], tokens=40.0, seed=seed)


def write_scores(folder: Path, accuracy: float, *, tokens: float, seed: int, problems_sha256: str = "p" * 64) -> Scores:
    """Scores of about that accuracy."""
    per_problem = np.random.default_rng(seed).binomial(4, accuracy, PROBLEMS) / 4
    scores = Scores(
        task="heldout",
        model=f"{folder.parent.parent.name}/hf",
        num_problems=PROBLEMS,
        samples_per_problem=4,
        temperature=1.0,
        accuracy=float(per_problem.mean()),
        accuracy_interval=accuracy_interval(per_problem.tolist()),
        boxed_share=0.85,
        mean_tokens=tokens,
        truncated_share=0.004,
        per_problem=tuple(per_problem.tolist()),
        problems_sha256=problems_sha256,
        weights_sha256="w" * 64,
    )
    rundir.write_json(folder / "scores.json", asdict(scores))
    rundir.mark_done(folder)
    return scores


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    rundir.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
