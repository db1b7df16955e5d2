"""`octo pipeline RECIPE`: the stages in a row."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_octo import console
from megatron_octo.cli.options import parse_recipe, recipe_parser
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.launch.pipeline import check_inputs, run_pipeline, stages


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = recipe_parser("pipeline", "Run every stage of a pipeline; what is DONE is skipped.")
    options.add_argument("--dry-run", action="store_true", help="list the stages and their commands; touch nothing")
    options.add_argument("--json", action="store_true", help="with --dry-run: machine output")
    own, overrides = parse_recipe(options, argv, (PipelineConfig,))
    config = load_recipe(own.recipe, PipelineConfig, overrides, command="octo pipeline")
    if not own.dry_run:
        run_pipeline(config)
        return
    check_inputs(config)
    rows = [{"stage": s.name, "done": s.done, "command": f"octo {' '.join(s.argv)}"} for s in stages(config)]
    if own.json:
        console.emit_json(rows)
    else:
        console.emit("\n".join(f"{'done' if row['done'] else 'to do':<6} {row['command']}" for row in rows))
