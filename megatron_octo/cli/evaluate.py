"""`octo evaluate RECIPE | HF_FOLDER...`: sample answers with vLLM, grade them, write scores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_octo import console, rundir
from megatron_octo.cli.options import parse_recipe, parser
from megatron_octo.config.evaluate import EvaluateConfig, ScoredModel
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput

# Own option -> the field of EvaluateConfig that it sets.
FIELDS = {
    "task": "task",
    "problems": "problems",
    "samples": "samples_per_problem",
    "temperature": "temperature",
    "max_new_tokens": "max_new_tokens",
    "seed": "seed",
}
RECIPE_SUFFIXES = (".py", ".json")


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    own, config = parse(argv)
    if own.dry_run:
        _dry_run(config, overwrite=own.overwrite, as_json=own.json)
        return
    from megatron_octo.evaluate.run import evaluate

    scores = evaluate(config, overwrite=own.overwrite)
    if own.json:
        console.emit_json([asdict(each) for each in scores])
        return
    console.table(
        f"{config.task}: {scores[0].num_problems} problems x {config.samples_per_problem} answers",
        ("model", "right, %", "95% interval", "boxed, %", "mean tokens", "cut off, %"),
        [
            (
                each.model,
                f"{100 * each.accuracy:.1f}",
                " to ".join(f"{100 * bound:.1f}" for bound in each.accuracy_interval),
                f"{100 * each.boxed_share:.1f}",
                f"{each.mean_tokens:.1f}",
                f"{100 * each.truncated_share:.1f}",
            )
            for each in scores
        ],
    )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, EvaluateConfig]:
    """The options and settings, refused where they make no sense; models and problems need not be there yet."""
    options = _parser()
    own, overrides = parse_recipe(options, argv, (EvaluateConfig, PipelineConfig))
    if _is_recipe(own.target[0]):
        return own, _from_recipe(own, overrides)
    if overrides == ["--help"]:
        options.parse_args(overrides)
    if overrides:
        options.error(f"unrecognized arguments: {' '.join(overrides)}")
    return own, _from_folders(own)


def _parser() -> argparse.ArgumentParser:
    out = parser(
        "evaluate",
        "Sample answers with vLLM, grade them, and write samples.jsonl and scores.json for each model.\n"
        "Models whose scores are done are skipped.\n\n"
        "  octo evaluate recipes/mine.py:heldout\n"
        "  octo evaluate recipes/miniature.py --when before\n"
        "  octo evaluate runs/x/hf/step_00000480 --task heldout --problems heldout.jsonl --samples 4 --temperature 1",
    )
    out.add_argument("target", nargs="+", metavar="RECIPE | FOLDER", help="a recipe, or Hugging Face folders")
    out.add_argument("--when", choices=("before", "after"), help="which evaluation of a pipeline: before or after RL")
    out.add_argument("--task", help="name of the problem set; names the scores folder")
    out.add_argument("--problems", help="JSON lines with `input` (the prompt) and `label` (the answer)")
    out.add_argument("--samples", type=int, help="answers to each problem (default 1)")
    out.add_argument("--temperature", type=float, help="0, the default, is greedy")
    out.add_argument("--max-new-tokens", type=int, help="longest answer, tokens (default 1024)")
    out.add_argument("--seed", type=int, help="draws the samples (default 0)")
    out.add_argument(
        "--output",
        type=Path,
        help="for folders: scores go to OUTPUT/<model>/<task>, where <model> is the folder's path below OCTO_RUNS "
        "(RUN/hf/STEP), or else its name (default: OCTO_RUNS/scores)",
    )
    out.add_argument("--overwrite", action="store_true", help="score again what is already scored")
    out.add_argument("--dry-run", action="store_true", help="check everything, start nothing")
    out.add_argument("--json", action="store_true", help="machine output")
    return out


def _is_recipe(target: str) -> bool:
    return target.partition(":")[0].endswith(RECIPE_SUFFIXES)


def _from_recipe(own: argparse.Namespace, overrides: list[str]) -> EvaluateConfig:
    if len(own.target) > 1:
        raise BadInput(f"one recipe at a time, not {' '.join(own.target)}", fix="give one recipe, or folders only")
    if own.output is not None:
        raise BadInput("--output with a recipe: the recipe says where scores go", fix="leave --output out")
    (spec,) = own.target
    when = own.when
    if when is None and isinstance(load_recipe(spec, (EvaluateConfig, PipelineConfig)), PipelineConfig):
        if overrides != ["--help"]:
            raise BadInput(
                f"{spec} is a pipeline, with two evaluations", fix="say which: --when before or --when after"
            )
        when = "before"
    prefix = f"evaluate-{when}." if when else ""
    shorthands = [
        part
        for option, field in FIELDS.items()
        if getattr(own, option) is not None
        for part in (f"--{prefix}{field.replace('_', '-')}", str(getattr(own, option)))
    ]
    if when is None:
        return load_recipe(spec, EvaluateConfig, [*shorthands, *overrides], command="octo evaluate")
    pipeline = load_recipe(spec, PipelineConfig, [*shorthands, *overrides], command="octo evaluate")
    chosen = pipeline.evaluate_before if when == "before" else pipeline.evaluate_after
    if chosen is None:
        raise BadInput(f"{spec} evaluates nothing after RL", fix="--when before, or add evaluate_after to the recipe")
    return chosen


def _from_folders(own: argparse.Namespace) -> EvaluateConfig:
    recipe = next((target for target in own.target if _is_recipe(target)), None)
    if recipe is not None:
        raise BadInput(f"recipe {recipe} among folders", fix="give one recipe, or folders only")
    if own.when is not None:
        raise BadInput("--when without a recipe", fix="--when chooses between a pipeline recipe's evaluations")
    missing = [f"--{name}" for name in ("task", "problems") if getattr(own, name) is None]
    if missing:
        raise BadInput(f"folders need {' and '.join(missing)}", fix="octo evaluate FOLDER --task NAME --problems FILE")
    given = {field: getattr(own, option) for option, field in FIELDS.items() if getattr(own, option) is not None}
    given["problems"] = Path(own.problems)
    root = own.output or rundir.runs_root() / "scores"
    models = [Path(target) for target in own.target]
    return EvaluateConfig(
        **given, models=tuple(ScoredModel(model=each, output=root / _label(each) / own.task) for each in models)
    )


def _label(model: Path) -> Path:
    """What a model is called below the scores folder."""
    path, root = model.resolve(), rundir.runs_root().resolve()
    if path.is_relative_to(root):
        return path.relative_to(root)
    return Path(*path.parts[-3:]) if path.parent.name == "hf" else Path(path.name)  # RUN/hf/step_... of other runs


def _dry_run(config: EvaluateConfig, *, overwrite: bool, as_json: bool) -> None:
    from megatron_octo.evaluate.run import check, read_problems

    problems = read_problems(config.problems)
    pending = check(config, overwrite=overwrite)
    rows = [(str(each.model), str(each.output), "to score" if each in pending else "done") for each in config.models]
    if as_json:
        keys = ("model", "output", "state")
        console.emit_json({"problems": len(problems), "models": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    answers = len(problems) * config.samples_per_problem
    console.table(
        f"{config.task}: {len(problems)} problems x {config.samples_per_problem} = {answers:,} answers a model, "
        f"temperature {config.temperature:g}, at most {config.max_new_tokens:,} tokens",
        ("model", "scores", "state"),
        rows,
    )
