"""One stage of mid-training, top to bottom: `train(config)`. The stable stage and the decay branches are the same code.

Run it by `octo train`, by torchrun (`-m megatron_octo train`), or by srun with one task a rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import lineage, rundir
from megatron_octo.budget import ledger
from megatron_octo.budget.schedule import rate_at
from megatron_octo.config.base import to_dict
from megatron_octo.config.train import FromImport, FromRun, MidTrainConfig, TrainPlan
from megatron_octo.console import duration, logger
from megatron_octo.data import mix
from megatron_octo.data.loader import Loader, build_dataset, source_order
from megatron_octo.data.mixture import Mixture, read_mixture
from megatron_octo.errors import BadInput
from megatron_octo.model.build import check_platform, fp8_missing
from megatron_octo.model.weights import check_shape, load_weights
from megatron_octo.platform import resolve
from megatron_octo.platform.process_group import model_parallel, world
from megatron_octo.train import checkpoint
from megatron_octo.train.distributed import Place, build_chunks, from_source, place, wrap_chunks
from megatron_octo.train.metrics import Metrics
from megatron_octo.train.optimizer import build_optimizer, set_numbers, set_rate
from megatron_octo.train.state import TrainState, latest_save, read_state, save_at
from megatron_octo.train.step import train_step

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
    "compute",
    "budget.micro_batch_sequences",
    "save",
    "log_every_steps",
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


def train(config: MidTrainConfig) -> None:
    """Train the stage to its end, from its last save if it has one. All ranks call it.

    Returns at once if the run is done. Afterwards the run folder holds metrics.jsonl, saves and DONE.

    Raises:
        BadInput: see `check`; or the run folder is in use. Nothing was changed.
        OctoError: the loss is not finite.
    """
    log, run, me = logger(__name__), rundir.run_folder(config.name), world()
    if finished(config):
        log.info("%s is done: nothing to train", run)
        return
    if me.rank == 0:
        rundir.check_free(run)
    inputs, platform = check(config, me.size), resolve()
    check_platform(config, platform)
    with contextlib.ExitStack() as stack:
        if me.rank == 0:
            stack.enter_context(rundir.lock(run))
        stack.enter_context(model_parallel(platform, config.parallel, seed=config.seed))
        log.info("%s on %s\n%s", config.name, platform.describe(), inputs.plan.arithmetic(config))
        if missing := fp8_missing(config.precision, platform):
            log.warning("training in bf16: precision.fp8 %s needs %s", config.precision.fp8, missing)
        _train(config, inputs, platform, run)


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
    resumed = latest_save(run)
    if resumed is not None:  # the start is behind it: its folder may be gone
        return Inputs(plan=plan, mixture=mixture, start_folder=None, parent=lineage.read(resumed).parent)
    folder = _start_folder(config)
    if folder is None:
        return Inputs(plan=plan, mixture=mixture, start_folder=None, parent=None)
    check_shape(config.model, folder)
    return Inputs(plan=plan, mixture=mixture, start_folder=folder, parent=lineage.read_if_present(folder))


def _train(config: MidTrainConfig, inputs: Inputs, platform: Platform, run: Path) -> None:
    """The stage, inside its process group."""
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
    schedule = get_forward_backward_func()
    metrics = Metrics(run, config, plan, step=state.step, time_s=state.time_s) if here.is_source else None
    for chunk in wrapped:
        chunk.train()
    while state.step < plan.num_steps:
        rate = rate_at(config.learning_rate, state.tokens, config.budget.train_tokens)
        set_rate(optimizer, rate)
        result = train_step(
            wrapped,
            optimizer,
            loader,
            consumed_sequences=state.consumed_sequences,
            config=config,
            schedule=schedule,
        )
        state = replace(
            state,
            step=state.step + 1,
            consumed_sequences=state.consumed_sequences + config.budget.batch_sequences,
            tokens=state.tokens + plan.batch_tokens,
        )
        if metrics:
            metrics.record(state.step, result, rate)
        if state.step % config.save.every_steps == 0 or state.step == plan.num_steps:
            if metrics:
                metrics.flush()
                state = replace(state, time_s=metrics.time_s)
            checkpoint.save(
                run,
                state,
                config=config,
                chunks=chunks,
                wrapped=wrapped,
                optimizer=optimizer,
                ledger=_ledger(config, inputs, order, state),
                parent=inputs.parent,
            )

    if metrics:
        metrics.close()
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
