"""`octo report RECIPE | PIPELINE_FOLDER | RUN...`: one page of lineage, curves, accuracy before and after RL."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_octo import console, rundir
from megatron_octo.cli.options import parser
from megatron_octo.config.load import load_recipe
from megatron_octo.config.pipeline import PipelineConfig
from megatron_octo.errors import BadInput
from megatron_octo.report.load import load
from megatron_octo.report.numbers import verdict
from megatron_octo.report.page import NUMBERS, PAGE, write
from megatron_octo.report.source import Source, of_pipeline, of_runs

RECIPE_SUFFIXES = (".py", ".json")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, refused where they make no sense; what they name need not be there yet."""
    options = parser(
        "report",
        "Write report.html, one page that needs no network, and report.json, its numbers. Reads files of run\n"
        "folders only; what has not run yet is named on the page.\n\n"
        "  octo report recipes/miniature.py:pipeline\n"
        "  octo report miniature\n"
        "  octo report miniature-stable miniature-decay-short miniature-rl-short",
    )
    options.add_argument(
        "target",
        nargs="+",
        metavar="RECIPE | FOLDER",
        help="a pipeline's recipe or folder, or run folders (paths, or names of runs in OCTO_RUNS)",
    )
    options.add_argument(
        "--output", type=Path, help="folder to write (default: report/ in the pipeline's folder, or OCTO_RUNS/report)"
    )
    options.add_argument("--dry-run", action="store_true", help="say what the page would tell; write nothing")
    options.add_argument("--json", action="store_true", help="machine output")
    own: argparse.Namespace = options.parse_args(argv)
    return own


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    own = parse(argv)
    source = _source(own.target)
    output = own.output or (source.pipeline or rundir.runs_root()) / "report"
    if output.exists() and not output.is_dir():
        raise BadInput(f"--output {output} is not a folder", fix="give a folder; report.html goes into it")
    if not own.dry_run:
        write(source, output)
    report = load(source)
    if own.json:
        files = {"html": str(output / PAGE), "json": str(output / NUMBERS)}
        console.emit_json({**files, "verdict": verdict(report), "notes": list(report.notes)})
        return
    lines = [verdict(report), *(f"not there yet: {note}" for note in report.notes)]
    console.emit("\n".join([*lines, f"{'would write' if own.dry_run else 'wrote'} {output / PAGE}"]))


def _source(targets: Sequence[str]) -> Source:
    first = targets[0]
    if first.partition(":")[0].endswith(RECIPE_SUFFIXES):
        if len(targets) > 1:
            raise BadInput(f"one recipe at a time, not {' '.join(targets)}", fix="give one recipe, or run folders only")
        return of_pipeline(load_recipe(first, PipelineConfig, command="octo report"))
    folders = [_folder(target) for target in targets]
    if len(folders) == 1 and _is_pipeline(folders[0]):
        return of_pipeline(load_recipe(str(folders[0] / "config.json"), PipelineConfig, command="octo report"))
    return of_runs(folders)


def _folder(target: str) -> Path:
    """The folder of a run, given as a path or as a name."""
    for path in (Path(target), rundir.run_folder(target)):
        if path.is_dir():
            return path
    raise BadInput(
        f"no run {target!r}: neither a folder nor a run of {rundir.runs_root()}", fix="check the name or path"
    )


def _is_pipeline(folder: Path) -> bool:
    path = folder / "config.json"
    return path.exists() and {"stable", "branches"} <= set(rundir.read_json(path))
