"""`octo pipeline`, killed again and again wherever chance says, still ends with every stage whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo import rundir, stage_log
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.train import BudgetConfig, MidTrainConfig, SaveConfig
from megatron_octo.launch.pipeline import stages
from tests.conftest import REPOSITORY

pytest.importorskip("vllm", reason="vllm is not installed")
pytestmark = pytest.mark.timeout(1800)
NUM_STEPS = 40
LONGEST_WAIT_S = 4.0  # into a stage; most have passed by then


def small(stage: MidTrainConfig) -> MidTrainConfig:
    """The stage with few steps and many saves."""
    tokens = NUM_STEPS * stage.budget.batch_sequences * stage.data.seq_length
    return replace(
        stage,
        budget=BudgetConfig(train_tokens=tokens, batch_sequences=stage.budget.batch_sequences, micro_batch_sequences=4),
        save=SaveConfig(every_steps=8),
        log_every_steps=8,
    )


@pytest.fixture
def config(runs: Path) -> PipelineConfig:
    """The control of the miniature, which has no RL, made small."""
    return small_road(load_recipe(str(REPOSITORY / "recipes/miniature.py:shuffled_answers"), PipelineConfig))


def small_road(road: PipelineConfig) -> PipelineConfig:
    """A road of the miniature's up to RL, with little text, few steps and few problems."""
    assert road.corpora is not None
    few = tuple((name, 1500) for name, _ in road.corpora.documents)
    return replace(
        road,
        corpora=replace(road.corpora, documents=few, num_rl_problems=8, num_heldout_problems=8),
        stable=small(road.stable),
        branches=tuple(map(small, road.branches)),
        evaluate_before=replace(
            road.evaluate_before,
            models=tuple(
                replace(scored, model=scored.model.with_name(f"step_{NUM_STEPS:08d}"))
                for scored in road.evaluate_before.models
            ),
            samples_per_problem=1,
        ),
        train_ranks=1,
    )


def run(config: PipelineConfig, log: Path, *, kill_in: str = "", after_s: float = 0.0, group: bool = False) -> int:
    """Run the pipeline; with `kill_in`, until `after_s` seconds after that stage begins. Returns the exit code."""
    settings = log.with_name("pipeline.json")
    rundir.write_json(settings, to_dict(config))
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_octo", "pipeline", str(settings)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        while kill_in and process.poll() is None and f"] {kill_in}: octo" not in log.read_text():
            time.sleep(0.05)
        if kill_in:
            time.sleep(after_s)
            if group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        return process.wait()


@pytest.mark.parametrize("num_kills", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_a_pipeline_killed_anywhere_goes_on_to_the_same_end(config: PipelineConfig, tmp_path: Path, num_kills: int):
    draw = random.Random(num_kills)
    for _ in range(num_kills):
        left = [stage.name for stage in stages(config) if not stage.done]
        run(
            config,
            tmp_path / "log",
            kill_in=draw.choice(left),
            after_s=draw.uniform(0, LONGEST_WAIT_S),
            group=draw.random() < 0.5,
        )
    assert run(config, tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]

    assert all(stage.done for stage in stages(config) if stage.outputs)
    home = rundir.run_folder(config.name)
    assert (home / "report" / "report.html").exists()
    assert [cost.stage for cost in stage_log.costs(home)] == [stage.name for stage in stages(config)]
    for stage in (config.stable, *config.branches):
        folder = rundir.run_folder(stage.name)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
        ledger = rundir.read_json(rundir.step_folder(folder, NUM_STEPS) / "ledger.json")
        assert ledger["consumed_tokens"] == stage.budget.train_tokens
    assert not [path for path in home.parent.rglob("*") if path.suffix in (".tmp", ".old")]
