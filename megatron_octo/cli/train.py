"""`octo train RECIPE`: one mid-training stage, on one rank or several; or a proof that it goes on exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_octo import console
from megatron_octo.cli.options import at_least_one, parse_recipe, recipe_parser
from megatron_octo.config.base import to_dict
from megatron_octo.config.load import load_recipe, override
from megatron_octo.config.train import FromRun, MidTrainConfig
from megatron_octo.errors import BadInput, VerificationError
from megatron_octo.plan.memory import rank_memory
from megatron_octo.platform.process_group import started_by_launcher, world


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = recipe_parser("train", "Run a mid-training stage: stable, or a decay branch. Resumes from its last save.")
    options.add_argument(
        "--ranks", type=at_least_one, default=1, help="processes to start on this machine (default: 1)"
    )
    options.add_argument(
        "--from",
        dest="parent",
        metavar="RUN[@TOKENS]",
        help="start from that run's newest good save, or from its save at so many tokens, whatever the recipe says",
    )
    options.add_argument(
        "--reweigh", action="store_true", help="let data.sources differ from the run folder's, from its last save on"
    )
    options.add_argument(
        "--verify-resume",
        action="store_true",
        help="train nothing; show that the batches after the last save are the same for any number of ranks",
    )
    options.add_argument(
        "--batches", type=at_least_one, default=1000, help="with --verify-resume: how many (default: 1000)"
    )
    options.add_argument("--dry-run", action="store_true", help="print the plan's arithmetic; touch nothing")
    options.add_argument("--json", action="store_true", help="with --dry-run or --verify-resume: machine output")
    own, overrides = parse_recipe(options, argv, (MidTrainConfig,))
    config = load_recipe(own.recipe, MidTrainConfig)
    if own.parent is not None:
        config = _branch(config, own.parent)
    config = override(config, overrides, prog=f"octo train {own.recipe}")
    num_ranks = world().size if started_by_launcher() else own.ranks
    if own.dry_run and own.verify_resume:
        raise BadInput(
            "--dry-run and --verify-resume ask for two different things", fix="give one of them: neither trains"
        )
    if own.dry_run:
        if own.parent is not None and isinstance(config.start, FromRun):
            from megatron_octo.train.start import check_parent

            check_parent(config.start, config)
        _show(config, num_ranks, as_json=own.json)
    elif own.verify_resume:
        _verify(config, own.batches, as_json=own.json)
    elif num_ranks > 1 and not started_by_launcher():
        _launch(config, num_ranks, argv, reweigh=own.reweigh)
    else:
        from megatron_octo.train.run import train

        train(config, reweigh=own.reweigh)


def _branch(config: MidTrainConfig, parent: str) -> MidTrainConfig:
    """The same stage, started from `parent`, which is RUN or RUN@TOKENS."""
    run, at, digits = parent.partition("@")
    if not run:
        raise BadInput(f"--from {parent!r} names no run", fix="give RUN, or RUN@TOKENS")
    start = config.start if isinstance(config.start, FromRun) else FromRun(run=run)
    try:
        tokens = int(digits.replace(",", "")) if at else None
    except ValueError:
        raise BadInput(f"--from {parent}: {digits!r} is no number of tokens", fix="give RUN, or RUN@TOKENS") from None
    return replace(config, start=replace(start, run=run, step=None, tokens=tokens))


def _show(config: MidTrainConfig, num_ranks: int, *, as_json: bool) -> None:
    plan = config.resolve(num_ranks)
    memory = rank_memory(config, plan)
    if as_json:
        console.emit_json({"plan": to_dict(plan), "memory": to_dict(memory), "config": to_dict(config)})
        return
    tokens = [f"{source.name} {source.weight:.2%}" for source in config.data.sources]
    console.emit(f"{config.name}\n{plan.arithmetic(config)}\nmixture {', '.join(tokens)}\n{memory.arithmetic()}")


def _verify(config: MidTrainConfig, num_batches: int, *, as_json: bool) -> None:
    from megatron_octo.train.verify_resume import verify_resume

    proof = verify_resume(config, num_batches=num_batches)
    if as_json:
        console.emit_json(to_dict(proof))
    else:
        console.table(
            f"{config.name}: batches {proof.first_batch:,} to {proof.last_batch:,} after {proof.save}",
            ("data-parallel ranks", "micro-batch", "ids and tokens"),
            [
                (
                    each.data_ranks,
                    each.micro_batch_sequences,
                    "the same" if each.differs_at is None else f"differ from batch {each.differs_at:,} on",
                )
                for each in proof.layouts
            ],
        )
    if not proof.holds:
        raise VerificationError(
            f"a resume of {config.name} would not read what an index built afresh says",
            fix="delete the run's index folder, which is then built anew, and verify again; see the first that differs",
        )


def _launch(config: MidTrainConfig, num_ranks: int, argv: Sequence[str], *, reweigh: bool) -> None:
    """Refuse bad input here, where the exit code is ours to give, and start the ranks."""
    from megatron_octo import rundir
    from megatron_octo.launch.local import run_ranks
    from megatron_octo.train.run import check, finished

    run = rundir.run_folder(config.name)
    if finished(config, reweigh=reweigh):
        console.logger(__name__).info("%s is done: nothing to train", run)
        return
    rundir.check_free(run)
    check(config, num_ranks, reweigh=reweigh)
    if config.asks_of_the_machine:  # only then is torch worth its seconds here
        from megatron_octo.model.build import check_platform
        from megatron_octo.platform import resolve

        check_platform(config, resolve())
    run_ranks(["train", *argv], num_ranks)
