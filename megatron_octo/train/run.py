"""One stage of mid-training, top to bottom: `train(config)`. The stable stage and the decay branches are the same code.

Run it by `octo train`, by torchrun (`-m megatron_octo train`), or by srun with one task a rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import lineage, rundir
from megatron_octo.budget import ledger
from megatron_octo.budget.schedule import rate_at
from megatron_octo.budget.watch import rolled_back
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import FromImport, FromRun, MidTrainConfig, TrainPlan
from megatron_octo.console import duration, logger
from megatron_octo.data import mix
from megatron_octo.data.loader import Loader, build_dataset, source_order
from megatron_octo.data.mixture import Mixture, read_held_out, read_mixture
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.model.build import check_platform
from megatron_octo.model.weights import check_shape, load_weights
from megatron_octo.platform import resolve
from megatron_octo.platform.process_group import model_parallel, world
from megatron_octo.train import checkpoint
from megatron_octo.train.again import RunAgain
from megatron_octo.train.distributed import Place, build_chunks, from_source, place, wrap_chunks
from megatron_octo.train.marks import Marks, marks
from megatron_octo.train.metrics import Metrics
from megatron_octo.train.observer import Observer
from megatron_octo.train.optimizer import build_optimizer, set_numbers, set_rate
from megatron_octo.train.state import TrainState, latest_save, read_state, save_at
from megatron_octo.train.step import train_step
from megatron_octo.train.straggler import Straggler
from megatron_octo.train.validate import Validation, held_out_loaders
from megatron_octo.train.watchdog import watchdog

if TYPE_CHECKING:
    from megatron_octo.platform import Platform

# What a rerun of a run folder may change: it moves work between ranks, or only says how to watch and keep it.
MAY_DIFFER = (
    "parallel.tensor",
    "parallel.sequence",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.overlap_grad_reduce",
    "parallel.overlap_param_gather",
    "budget.micro_batch_sequences",
    "save",
    "watch",
    "validate",
    "marks",
    "log_every_steps",
    "wandb_project",
)
FIX = "give this run another name (--name), or the settings of the folder"
REPORTED_PACKAGES = ("megatron_octo", "torch", "megatron-core", "transformer-engine", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a stage starts from, found good."""

    plan: TrainPlan
    mixture: Mixture
    start_folder: Path | None
    """Weights of an import or of a parent's save; None for random ones, and when the run resumes."""
    parent: lineage.Lineage | None
    """The descent of the weights it started from."""
    held_out: dict[str, Mixture] = field(default_factory=dict)
    """What each source holds out, if the stage validates."""


def train(config: MidTrainConfig) -> None:
    """Train the stage to its end, from its last save if it has one. All ranks call it.

    Returns at once if the run is done. Afterwards the run folder holds metrics.jsonl, saves and DONE.

    Raises:
        BadInput: see `check`; or the run folder is in use. Nothing was changed.
        OctoError: a step looks wrong and `config.watch` says to stop.
    """
    log, run, me = logger(__name__), rundir.run_folder(config.name), world()
    if finished(config):
        log.info("%s is done: nothing to train", run)
        return
    if me.rank == 0:
        rundir.check_free(run)
    inputs, platform = check(config, me.size), resolve()
    check_platform(config.parallel, platform)
    with contextlib.ExitStack() as stack:
        beside = stack.enter_context(marks(run, config)) if me.rank == 0 else None
        if me.rank == 0:
            stack.enter_context(rundir.lock(run))
        stack.enter_context(model_parallel(platform, config.parallel, seed=config.seed))
        log.info("%s on %s\n%s", config.name, platform.describe(), inputs.plan.arithmetic(config))
        alive = stack.enter_context(watchdog(run, config.watch.hang_timeout_s))
        _train(config, inputs, platform, run, alive=alive, beside=beside)


def finished(config: MidTrainConfig) -> bool:
    """Whether the run is done; reads only.

    Raises:
        BadInput: the run folder was made with other settings.
    """
    run = rundir.run_folder(config.name)
    rundir.check_config(run, to_dict(config), fix=FIX, may_differ=MAY_DIFFER)
    return rundir.is_done(run)


def check(config: MidTrainConfig, world_size: int) -> Inputs:
    """Check everything that can be wrong before torch loads; reads only.

    Raises:
        BadInput: the layout does not fit the ranks; the run folder was made with other settings; a data set, the
            import or the parent's save is missing; the tokenizer or the weights do not fit the model.
    """
    plan = config.resolve(world_size)
    run = rundir.run_folder(config.name)
    rundir.check_config(run, to_dict(config), fix=FIX, may_differ=MAY_DIFFER)
    mixture = read_mixture(config.data, model_vocab_size=config.model.vocab_size)
    mix.check_repeats(mix.plan(config.data, available=mixture.tokens, train_tokens=config.budget.train_tokens))
    if config.wandb_project is not None and find_spec("wandb") is None:
        raise BadInput(
            f"wandb_project is {config.wandb_project}, but the wandb package is not installed",
            fix="pip install 'megatron_octo[wandb]', or leave wandb_project out",
        )
    held_out = read_held_out(config.data, mixture) if config.validate.every_steps else {}
    inputs = Inputs(plan=plan, mixture=mixture, start_folder=None, parent=None, held_out=held_out)
    resumed = latest_save(run)
    if resumed is not None:  # the start is behind it: its folder may be gone
        return replace(inputs, parent=lineage.read(resumed).parent)
    folder = _start_folder(config)
    if folder is None:
        return inputs
    check_shape(config.model, folder)
    return replace(inputs, start_folder=folder, parent=lineage.read_if_present(folder))


def _train(
    config: MidTrainConfig,
    inputs: Inputs,
    platform: Platform,
    run: Path,
    *,
    alive: Callable[[], None],
    beside: Marks | None,
) -> None:
    """The stage, inside its process group. `alive` is called when something has ended; rank 0 has `beside`."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    plan, here = inputs.plan, place()
    cut = not config.data.across_documents  # then every stage finds the documents' borders in the tokens
    if here.is_source:
        _write_records(config, inputs, platform, run)

    # data
    index = run / "index"
    if here.is_source and not rundir.is_done(index):
        shutil.rmtree(index, ignore_errors=True)  # megatron takes a file torn by a kill for a whole one
    dataset = build_dataset(
        inputs.mixture,
        num_sequences=plan.num_steps * config.budget.batch_sequences,
        seq_length=config.data.seq_length,
        seed=config.data.shuffle_seed,
        cache=index,
        reads_data=here.reads_data or cut,
    )
    if here.is_source:
        rundir.mark_done(index)
    loader = Loader(
        dataset=dataset,
        data_rank=here.data_rank,
        data_ranks=here.data_ranks,
        micro_batch_sequences=config.budget.micro_batch_sequences,
        num_micro_batches=plan.num_micro_batches,
        device=platform.device,
        cut_after=inputs.mixture.eos_id if cut else None,
    )
    order = source_order(dataset, inputs.mixture) if here.is_source else None

    # model and optimizer
    chunks = build_chunks(config, platform)
    wrapped = wrap_chunks(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    state = _fill(config, inputs, run, chunks, optimizer, layout=_layout(config, here, platform))

    # steps
    schedule, again = get_forward_backward_func(), RunAgain()
    loaders = held_out_loaders(inputs.held_out, loader, config, cache=index / "held_out", is_source=here.is_source)
    observer = Observer(
        metrics=Metrics(run, config, plan, step=state.step, time_s=state.time_s) if here.is_source else None,
        validation=Validation(wrapped=wrapped, loaders=loaders, config=config, schedule=schedule),
        straggler=Straggler(wrapped[0], config.watch, device=platform.device),
        marks=beside,
        alive=alive,
    )
    observer.saved()
    for chunk in wrapped:
        chunk.train()
    while state.step < plan.num_steps:
        observer.step_begins()
        rate = rate_at(config.learning_rate, state.tokens, config.budget.train_tokens)
        set_rate(optimizer, rate)
        result = train_step(wrapped, optimizer, loader, state=state, config=config, schedule=schedule, again=again)
        if result.rolls_back:
            state = _roll_back(config, inputs, run, chunks, optimizer, state=state, why=result.note)
            observer.rolled_back(state.step)
            continue
        state = replace(
            state,
            step=state.step + 1,
            consumed_sequences=state.consumed_sequences + config.budget.batch_sequences,
            tokens=state.tokens + plan.batch_tokens,
            watch=result.watch,
        )
        observer.step_ended(state.step, result, rate)
        if (
            state.step % config.save.every_steps == 0
            or state.step == plan.num_steps
            or config.marks.reached(state.tokens - plan.batch_tokens, state.tokens)
        ):
            state = replace(state, time_s=observer.save_begins())
            checkpoint.save(
                run,
                state,
                config=config,
                chunks=chunks,
                wrapped=wrapped,
                optimizer=optimizer,
                ledger=_ledger(config, inputs, order, state),
                parent=inputs.parent,
                in_use=observer.saves_in_use(),
            )
            observer.saved()

    observer.finished()
    if here.is_source:
        lineage.write(run, lineage.read(rundir.step_folder(run, state.step)))
        rundir.mark_done(run)
        logger(__name__).info(
            "%s: %s tokens in %s; saves in %s", config.name, f"{state.tokens:,}", duration(state.time_s), run
        )


def _fill(
    config: MidTrainConfig, inputs: Inputs, run: Path, chunks: list[Any], optimizer: Any, *, layout: str
) -> TrainState:
    """Give model and optimizer their values: this run's last save, else the start's. All ranks call it."""
    log = logger(__name__)
    save: Path | None = from_source(latest_save(run))
    if save is not None:
        state = read_state(save)
        checkpoint.load(save, chunks=chunks, optimizer=optimizer, same_layout=state.layout == layout)
        log.info("resumed after step %s from %s", f"{state.step:,}", save)
        state = replace(state, layout=layout)
    else:
        state = TrainState(layout=layout)
        start = config.start
        if isinstance(start, FromImport):
            assert inputs.start_folder is not None
            load_weights(chunks, inputs.start_folder)
        elif isinstance(start, FromRun):
            assert inputs.start_folder is not None
            checkpoint.load(
                inputs.start_folder,
                chunks=chunks,
                optimizer=optimizer if start.optimizer else None,
                same_layout=False,
            )
        if not (isinstance(start, FromRun) and start.optimizer):
            optimizer.reload_model_params()  # the fp32 copies follow the weights just loaded
        log.info("started from %s", inputs.start_folder or f"random weights, seed {config.seed}")
    set_numbers(optimizer, config)
    return state


def _roll_back(
    config: MidTrainConfig,
    inputs: Inputs,
    run: Path,
    chunks: list[Any],
    optimizer: Any,
    *,
    state: TrainState,
    why: str,
) -> TrainState:
    """This run's last save again, with the batches that led to the step after `state` left out. All ranks call it.

    Raises:
        OctoError: there is no save yet.
    """
    step = state.step + 1
    if from_source(latest_save(run)) is None:
        raise OctoError(
            f"step {step:,}: {why}; there is no save yet to go back to",
            fix="save before it (save.every_steps), or have it skipped (watch.on_*)",
        )
    back = _fill(config, inputs, run, chunks, optimizer, layout=state.layout)
    watch = rolled_back(config.watch, state.watch, back.watch, step=step, saved_step=back.step)
    if world().rank == 0:
        first, last = watch.left_out[-1]
        logger(__name__).warning(
            "step %s: %s; rolled back to step %s, the batches of steps %s to %s are left out",
            *(f"{step:,}", why, f"{back.step:,}", f"{first:,}", f"{last:,}"),
        )
    return replace(back, watch=watch)


def _start_folder(config: MidTrainConfig) -> Path | None:
    """The folder whose weights the stage starts from.

    Raises:
        BadInput: it is not there, or not whole.
    """
    start = config.start
    if isinstance(start, FromImport):
        if not rundir.is_done(start.path):
            state = "is not finished: it has no DONE" if start.path.exists() else "does not exist"
            raise BadInput(
                f"start.path {start.path} {state}",
                fix=f"run `octo convert from-hf HF_FOLDER {start.path}`, or correct start.path",
            )
        return start.path
    if isinstance(start, FromRun):
        return _parent_save(start, config)
    return None


def _parent_save(start: FromRun, config: MidTrainConfig) -> Path:
    parent = rundir.run_folder(start.run)
    if start.step is None and not rundir.is_done(parent):
        state = "has not finished" if parent.exists() else "does not exist"
        raise BadInput(
            f"the parent run {parent} {state}",
            fix="train it to its end first (`octo train`), or name one of its saves with --start.step",
        )
    save = latest_save(parent) if start.step is None else save_at(parent, start.step)
    if save is None:
        raise BadInput(
            f"the parent run {parent} has no save{'' if start.step is None else f' at step {start.step:,}'}",
            fix="correct start.run or start.step",
        )
    theirs = rundir.read_json(save / "config.json")["parallel"]["distributed_optimizer"]
    if start.optimizer and theirs != config.parallel.distributed_optimizer:
        raise BadInput(
            f"the moments in {save} were saved with parallel.distributed_optimizer {theirs}, this run has "
            f"{config.parallel.distributed_optimizer}",
            fix="use the parent's setting, or start without its moments (start.optimizer False)",
        )
    return save


def _ledger(config: MidTrainConfig, inputs: Inputs, order: Any, state: TrainState) -> dict[str, Any]:
    """The content of ledger.json on rank 0; empty on the others, which do not know the order."""
    if order is None:
        return {}
    lines = ledger.count(
        order,
        names=inputs.mixture.names,
        available=inputs.mixture.tokens,
        planned_sequences=inputs.plan.num_steps * config.budget.batch_sequences,
        consumed_sequences=state.consumed_sequences,
        seq_length=config.data.seq_length,
    )
    return ledger.to_json(lines)


def _layout(config: MidTrainConfig, here: Place, platform: Platform) -> str:
    p = config.parallel
    return (
        f"tensor {p.tensor} pipeline {p.pipeline}x{p.virtual_pipeline or 1} context {p.context} "
        f"data {here.data_ranks} layers {platform.layer_family}"
    )


def _write_records(config: MidTrainConfig, inputs: Inputs, platform: Platform, run: Path) -> None:
    """config.json, environment.json, plan.txt and lineage.json of the run folder. Rank 0 only."""
    rundir.write_json(run / "config.json", to_dict(config))
    rundir.write_json(
        run / "environment.json",
        {
            "host": socket.gethostname(),
            "ranks": inputs.plan.world_size,
            "threads_a_rank": os.environ.get("OMP_NUM_THREADS", "not set"),
            "platform": platform.describe(),
            "packages": {name: _version(name) for name in REPORTED_PACKAGES},
        },
    )
    rundir.write_atomic(run / "plan.txt", inputs.plan.arithmetic(config) + "\n")
    lineage.write(run, checkpoint.link(config, inputs.parent, TrainState()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
