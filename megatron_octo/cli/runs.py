"""`octo runs list | tree | show`: how far the runs under OCTO_RUNS are, and who descends from whom."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_octo import console, rundir
from megatron_octo.cli.options import parser
from megatron_octo.report.runs import RunStatus, find_run, forest, ledger, read_runs, saves


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = parser("runs", "How far the runs under OCTO_RUNS are, and who descends from whom. Reads files only.")
    commands = options.add_subparsers(dest="command", required=True, metavar="list | tree | show")
    commands.add_parser("list", help="a line for each run, and for each Slurm job without one")
    commands.add_parser("tree", help="the descent, from the base models down")
    show = commands.add_parser("show", help="one run: its saves, its ledger, its descent; or a Slurm job without a run")
    show.add_argument("run", metavar="RUN", help="a run's name or folder, a job's name or number")
    for each in commands.choices.values():
        each.add_argument("--json", action="store_true", help="machine output")
    own = options.parse_args(argv)
    if own.command == "show":
        _show(find_run(own.run), as_json=own.json)
        return
    runs = read_runs(rundir.runs_root())
    if own.json:
        console.emit_json(forest(runs) if own.command == "tree" else [run.to_dict() for run in runs])
    elif own.command == "tree":
        console.tree(str(rundir.runs_root()), forest(runs))
    else:
        rows = [(run.name, run.kind, run.describe(), _tokens(run), _parent(run)) for run in runs]
        console.table(f"runs in {rundir.runs_root()}", ("run", "kind", "state", "tokens", "starts from"), rows)


def _show(run: RunStatus, *, as_json: bool) -> None:
    kept, lines = saves(run), ledger(run)
    if as_json:
        console.emit_json({**run.to_dict(), "saves": kept, "ledger": lines})
        return
    console.emit(f"{run.name}  {run.kind}  {run.describe()}  {_tokens(run)}\nfolder {run.folder}")
    for link in run.descent.chain() if run.descent else ():
        step = f"  step {link.step:,}  {link.tokens:,} tokens" if link.step else ""
        code = f"  code {link.code}  recipe {link.recipe_sha256[:12]}" if link.code else ""
        console.emit(f"{link.kind:<7}{link.name}  weights {link.weights_sha256[:12] or '-'}{step}{code}")
    if kept:
        console.table("saves", ("step", "tokens"), [(f"{each['step']:,}", f"{each['tokens']:,}") for each in kept])
    if lines:
        console.table(
            "ledger of the last save",
            ("source", "planned", "consumed", "epochs", "available"),
            [
                (
                    each["name"],
                    f"{each['planned']:,}",
                    f"{each['consumed']:,}",
                    f"{each['epochs']:.3f}",
                    f"{each['available']:,}",
                )
                for each in lines
            ],
        )


def _tokens(run: RunStatus) -> str:
    return f"{run.tokens:,} of {run.train_tokens:,}" if run.train_tokens else ""


def _parent(run: RunStatus) -> str:
    if run.is_job and run.job:
        return " ".join(run.job.argv[1:])
    parent = run.descent.parent if run.descent else None
    return f"{parent.name} step {parent.step:,}" if parent and parent.step else parent.name if parent else ""
