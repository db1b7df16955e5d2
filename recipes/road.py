"""The whole road at full size: stable, three branches, their exports, scores, RL, scores again, one report.

For `slurm/pipeline.sh`, which makes a job of each stage, with as many GPUs as each asks for; `octo pipeline` would run
them on one machine.

What it reads must be there: the base model's Hugging Face folder, the sources of recipes/corpora.py, the prompts of
recipes/rl_zero.py, and the problems to score with: `runs/prompts/math500.jsonl`, JSON lines with `input`, the prompt,
and `label`, the answer. That problem set is our choice for this page; so is one greedy answer to each problem.

Time and scores: not yet measured.
"""

from pathlib import Path

import llama32_3b as model_3b
import rl_zero

from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.rundir import run_folder, step_folder

TASK = "math500"


def llama32_3b() -> PipelineConfig:
    """Llama-3.2-3B."""
    stable = model_3b.stable_200b()
    branches = (model_3b.decay_short(), model_3b.decay_long(), model_3b.decay_hybrid())
    rl = (rl_zero.llama32_3b_short(), rl_zero.llama32_3b_long(), rl_zero.llama32_3b_hybrid())
    exports = [run_folder(each.name) / "hf" / step_folder(Path(), each.num_steps).name for each in (stable, *branches)]
    return PipelineConfig(
        name="llama32-3b",
        base_folder=run_folder("hf") / "llama32-3b",
        import_folder=run_folder("base") / "llama32-3b",
        stable=stable,
        branches=branches,
        evaluate_before=_evaluation([(each, each.parents[1]) for each in exports]),
        rl=rl,
        evaluate_after=_evaluation([(each.output / "hf", each.output) for each in rl]),
    )


def _evaluation(models: list[tuple[Path, Path]]) -> EvaluateConfig:
    """Of (an export, the run's folder)."""
    return EvaluateConfig(
        task=TASK,
        problems=run_folder("prompts") / f"{TASK}.jsonl",
        models=tuple(ScoredModel(model=export, output=run / "scores" / TASK) for export, run in models),
    )
