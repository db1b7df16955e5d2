"""`octo train RECIPE`: one mid-training stage, on one rank or several."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_octo import console
from megatron_octo.cli.options import at_least_one, parse_recipe, recipe_parser
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.platform.process_group import started_by_launcher, world


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = recipe_parser("train", "Run a mid-training stage: stable, or a decay branch. Resumes from its last save.")
    options.add_argument(
        "--ranks", type=at_least_one, default=1, help="processes to start on this machine (default: 1)"
    )
    options.add_argument("--dry-run", action="store_true", help="print the plan's arithmetic; touch nothing")
    options.add_argument("--json", action="store_true", help="with --dry-run: machine output")
    own, overrides = parse_recipe(options, argv, (MidTrainConfig,))
    config = load_recipe(own.recipe, MidTrainConfig, overrides, command="octo train")
    num_ranks = world().size if started_by_launcher() else own.ranks
    if own.dry_run:
        _show(config, num_ranks, as_json=own.json)
    elif num_ranks > 1 and not started_by_launcher():
        _launch(config, num_ranks, argv)
    else:
        from megatron_octo.train.run import train

        train(config)


def _show(config: MidTrainConfig, num_ranks: int, *, as_json: bool) -> None:
    plan = config.resolve(num_ranks)
    if as_json:
        console.emit_json({"plan": to_dict(plan), "config": to_dict(config)})
        return
    tokens = [f"{source.name} {source.weight:.1%}" for source in config.data.sources]
    console.emit(f"{config.name}\n{plan.arithmetic(config)}\nmixture {', '.join(tokens)}")


def _launch(config: MidTrainConfig, num_ranks: int, argv: Sequence[str]) -> None:
    """Refuse bad input here, where the exit code is ours to give, and start the ranks."""
    from megatron_octo import rundir
    from megatron_octo.launch.local import run_ranks
    from megatron_octo.train.run import check, finished

    run = rundir.run_folder(config.name)
    if finished(config):
        console.logger(__name__).info("%s is done: nothing to train", run)
        return
    rundir.check_free(run)
    check(config, num_ranks)
    if config.asks_of_the_machine:  # only then is torch worth its seconds here
        from megatron_octo.model.build import check_platform
        from megatron_octo.platform import resolve

        check_platform(config, resolve())
    run_ranks(["train", *argv], num_ranks)
