"""One stage of mid-training, top to bottom: `train(config)`. The stable stage and the decay branches are the same code.

Run it by `octo train`, by torchrun (`-m megatron_octo train`), or by srun with one task a rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

from megatron_octo import lineage, rundir
from megatron_octo.budget.schedule import rate_at, weight_decay_at
from megatron_octo.budget.watch import rolled_back
from megatron_octo.config.base import fingerprint, to_dict
from megatron_octo.config.train import FromImport, FromRun, MidTrainConfig, TrainPlan
from megatron_octo.console import duration, logger
from megatron_octo.data.loader import Loader
from megatron_octo.data.mixture import Mixture, check_unchanged, read_held_out, read_mixture
from megatron_octo.data.phase import open_ledger, open_phase
from megatron_octo.errors import BadInput, OctoError
from megatron_octo.model.build import check_platform, fp8_missing
from megatron_octo.model.weights import load_weights
from megatron_octo.platform import resolve
from megatron_octo.platform.process_group import model_parallel, world
from megatron_octo.train import checkpoint
from megatron_octo.train.again import RunAgain
from megatron_octo.train.distributed import Place, build_chunks, place, wrap_chunks
from megatron_octo.train.marks import Marks, marks
from megatron_octo.train.metrics import Metrics
from megatron_octo.train.observer import Observer
from megatron_octo.train.optimizer import build_optimizer, follow_weights, set_numbers, set_rates
from megatron_octo.train.saver import Saver, newest_good, newest_good_of_parent, require_good
from megatron_octo.train.start import (
    check_branch,
    check_budget,
    data_phases,
    newest_readable,
    shared_data,
    start_folder,
)
from megatron_octo.train.state import TrainState, read_state
from megatron_octo.train.step import train_step
from megatron_octo.train.straggler import Straggler
from megatron_octo.train.validate import Validation, held_out_loaders
from megatron_octo.train.votes import stop_signals
from megatron_octo.train.watchdog import watchdog

if TYPE_CHECKING:
    from megatron_octo.budget.ledger import Phase
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
    "watch",
    "validate",
    "marks",
    "log_every_steps",
    "wandb_project",
)
# What it may change when asked to weigh its data anew (--reweigh).
REWEIGHED = ("data.sources",)
FIX = "give this run another name (--name), or the settings of the folder; --reweigh goes on with other data.sources"
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


def train(config: MidTrainConfig, *, reweigh: bool = False) -> None:
    """Train the stage to its end, from its last good save if it has one. All ranks call it.

    Returns at once if the run is done. Afterwards the run folder holds metrics.jsonl, saves and DONE; but no DONE if
    the run was asked to stop (`train/votes.py`): then a last save, to go on from.
    With `reweigh`, data.sources may differ from the run folder's: from its last save on the stage reads the new ones.

    Raises:
        BadInput: see `check`; or the run folder is in use. Nothing was changed.
        OctoError: a step looks wrong and `config.watch` says to stop, or a save cannot be written.
    """
    log, run, me = logger(__name__), rundir.run_folder(config.name), world()
    if finished(config, reweigh=reweigh):
        log.info("%s is done: nothing to train", run)
        return
    if me.rank == 0:
        rundir.check_free(run)
    inputs, platform = check(config, me.size, reweigh=reweigh), resolve()
    check_platform(config, platform)
    with rundir.lock(run) if me.rank == 0 else contextlib.nullcontext():
        with contextlib.ExitStack() as stack:
            beside = stack.enter_context(marks(run, config)) if me.rank == 0 else None
            graphs = config.compute.cuda_graphs
            stack.enter_context(model_parallel(platform, config.parallel, seed=config.seed, cuda_graphs=graphs))
            signals = stack.enter_context(stop_signals())  # until here they end a rank that waits for another one
            log.info("%s on %s\n%s", config.name, platform.describe(), inputs.plan.arithmetic(config))
            if missing := fp8_missing(config.precision, platform):
                log.warning("training in bf16: precision.fp8 %s needs %s", config.precision.fp8, missing)
            alive = stack.enter_context(watchdog(run, config.watch.hang_timeout_s))
            state = _train(config, inputs, platform, run, signals=signals, alive=alive, beside=beside)
        if me.rank == 0:  # the marks have ended too: a rerun would take up those that were cut off
            _close(config, run, state)


def finished(config: MidTrainConfig, *, reweigh: bool = False) -> bool:
    """Whether the run is done; reads only.

    Raises:
        BadInput: the run folder was made with other settings.
    """
    run = rundir.run_folder(config.name)
    done = rundir.is_done(run)
    may_differ = MAY_DIFFER + REWEIGHED if reweigh and not done else MAY_DIFFER
    rundir.check_config(run, to_dict(config), fix=FIX, may_differ=may_differ)
    return done


def check(config: MidTrainConfig, world_size: int, *, reweigh: bool = False) -> Inputs:
    """Check everything that can be wrong before torch loads; reads only.

    Raises:
        BadInput: the layout does not fit the ranks; the run folder was made with other settings; a data set, the
            import or the parent's save is missing, does not fit, or was prepared anew since the last save.
    """
    plan = config.resolve(world_size)
    finished(config, reweigh=reweigh)
    mixture = read_mixture(config.data, model_vocab_size=config.model.vocab_size)
    if config.wandb_project is not None and find_spec("wandb") is None:
        raise BadInput(
            f"wandb_project is {config.wandb_project}, but the wandb package is not installed",
            fix="pip install 'megatron_octo[wandb]', or leave wandb_project out",
        )
    held_out = read_held_out(config.data, mixture) if config.validate.every_steps else {}
    run = rundir.run_folder(config.name)
    resumed = newest_readable(run)
    check_budget(config, mixture, data_phases(config, resumed, None)[-1])
    if resumed is not None:  # the start is behind it: its folder may be gone
        check_unchanged(mixture, read_state(resumed).data, resumed)
        folder, parent = None, lineage.read(run).parent
    else:
        folder = start_folder(config, mixture)
        parent = lineage.read_if_present(folder) if folder else None
    return Inputs(plan=plan, mixture=mixture, start_folder=folder, parent=parent, held_out=held_out)


def _train(
    config: MidTrainConfig,
    inputs: Inputs,
    platform: Platform,
    run: Path,
    *,
    signals: Sequence[Signals],
    alive: Callable[[], None],
    beside: Marks | None,
) -> TrainState:
    """The stage, inside its process group; returns where it ended.

    `signals` are those that asked this rank to stop; `alive` is called when something has ended; rank 0 has `beside`.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    plan, here = inputs.plan, place()
    save, inputs = _good_save(config, inputs, run)
    cut = not config.data.across_documents  # then every stage finds the documents' borders in the tokens
    if here.is_source:
        _write_records(config, inputs, platform, run)

    # data
    phases = data_phases(config, save, inputs.start_folder)
    logger(__name__).info("%s", phases[-1].describe())
    with _whole_index(run / "index", phases[-1], is_source=here.is_source) as index:
        dataset = open_phase(config, inputs.mixture, phases[-1], cache=index, reads_data=here.reads_data or cut)
    loader = Loader(
        dataset=dataset,
        data_rank=here.data_rank,
        data_ranks=here.data_ranks,
        micro_batch_sequences=config.budget.micro_batch_sequences,
        num_micro_batches=plan.num_micro_batches,
        device=platform.device,
        cut_after=inputs.mixture.eos_id if cut else None,
    )
    ledger = open_ledger(config, inputs.mixture, phases, dataset) if here.is_source and dataset is not None else None
    alive()

    # model and optimizer
    chunks = build_chunks(config, platform, num_ids=inputs.mixture.vocab_size)
    wrapped = wrap_chunks(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    state = _fill(config, inputs, save, chunks, optimizer, layout=_layout(config, here, platform))
    alive()

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
    saver = Saver(
        run, config, chunks=chunks, wrapped=wrapped, optimizer=optimizer, parent=inputs.parent, observer=observer
    )
    for chunk in wrapped:
        chunk.train()
    stopped = False
    while state.step < plan.num_steps and not stopped:
        observer.step_begins()
        rate = rate_at(config.learning_rate, state.tokens, config.budget.train_tokens)
        weight_decay = weight_decay_at(config.optimizer, state.tokens, config.budget.train_tokens)
        set_rates(optimizer, rate=rate, weight_decay=weight_decay)
        try:
            result = train_step(
                wrapped,
                optimizer,
                loader,
                state=state,
                config=config,
                schedule=schedule,
                again=again,
                votes=lambda: saver.votes(stop=bool(signals)),
            )
        except OctoError:  # of all ranks alike
            saver.wait()
            raise
        if result.rolls_back:
            saver.wait()
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
        numbers = ledger.numbers(state.consumed_sequences) if ledger else {}
        observer.step_ended(state.step, result, rate, {"optim/weight_decay": weight_decay, **numbers})
        state = saver.step_ended(state, result.votes, ledger)
        stopped = result.votes.stop > 0
    saver.end()

    observer.finished(stopped=stopped)
    return state


def _good_save(config: MidTrainConfig, inputs: Inputs, run: Path) -> tuple[Path | None, Inputs]:
    """The save that the run goes on from; at its start None, and the inputs with a good save of its parent.

    All ranks call it. Good is the save that the settings name, or the parent's newest whose checksums hold.
    """
    save = newest_good(run)
    if save is not None or not isinstance(config.start, FromRun):
        return save, inputs
    assert inputs.start_folder is not None
    if config.start.names_save:
        require_good(inputs.start_folder)
        return None, inputs
    parent = newest_good_of_parent(rundir.run_folder(config.start.run))
    if parent != inputs.start_folder:  # of that one the records alone were good
        check_branch(config, config.start, inputs.mixture, parent)
    return None, replace(inputs, start_folder=parent, parent=lineage.read(parent))


def _close(config: MidTrainConfig, run: Path, state: TrainState) -> None:
    """Say how the stage ended; mark it DONE if that is its end. Rank 0 only."""
    log = logger(__name__)
    if state.step < config.num_steps:
        log.info("%s stopped after step %s, saved; run it again to go on", run, f"{state.step:,}")
        return
    lineage.write(run, lineage.read(rundir.step_folder(run, state.step)))
    rundir.mark_done(run)
    log.info("%s: %s tokens in %s; saves in %s", config.name, f"{state.tokens:,}", duration(state.time_s), run)


def _fill(
    config: MidTrainConfig, inputs: Inputs, save: Path | None, chunks: list[Any], optimizer: Any, *, layout: str
) -> TrainState:
    """Give model and optimizer their values: this run's good save, else the start's. All ranks call it."""
    log = logger(__name__)
    if save is not None:
        state = read_state(save)
        checkpoint.load(save, chunks=chunks, optimizer=optimizer, same_layout=state.layout == layout)
        log.info("resumed after step %s from %s", f"{state.step:,}", save)
    else:
        state = TrainState()
        start = config.start
        if isinstance(start, FromImport):
            assert inputs.start_folder is not None
            follow_weights(optimizer, load_weights(chunks, inputs.start_folder), config)
        elif isinstance(start, FromRun):
            assert inputs.start_folder is not None
            log.info("%s", shared_data(start, inputs.mixture, inputs.start_folder))
            loaded = checkpoint.load(
                inputs.start_folder,
                chunks=chunks,
                optimizer=optimizer if start.optimizer else None,
                same_layout=start.optimizer and read_state(inputs.start_folder).layout == layout,
            )
            if not start.optimizer:
                follow_weights(optimizer, loaded, config)
        log.info("started from %s", inputs.start_folder or f"random weights, seed {config.seed}")
    set_numbers(optimizer, config)
    mixture = inputs.mixture
    return replace(state, layout=layout, data=mixture.identities, tokenizer_sha256=mixture.tokenizer_sha256)


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
    save = newest_good(run)
    if save is None:
        raise OctoError(
            f"step {step:,}: {why}; there is no save yet to go back to",
            fix="save before it (save.every_steps), or have it skipped (watch.on_*)",
        )
    back = _fill(config, inputs, save, chunks, optimizer, layout=state.layout)
    watch = rolled_back(config.watch, state.watch, back.watch, step=step, saved_step=back.step)
    if world().rank == 0:
        first, last = watch.left_out[-1]
        logger(__name__).warning(
            "step %s: %s; rolled back to step %s, the batches of steps %s to %s are left out",
            *(f"{step:,}", why, f"{back.step:,}", f"{first:,}", f"{last:,}"),
        )
    return replace(back, watch=watch)


def index_is_whole(folder: Path, phase: Phase) -> bool:
    """Whether `folder` has the whole index of the phase."""
    return rundir.is_done(folder) and (folder / rundir.DONE).read_text().strip() == fingerprint(phase)


@contextlib.contextmanager
def _whole_index(folder: Path, phase: Phase, *, is_source: bool) -> Iterator[Path]:
    """A folder for the phase's index: rank 0 empties it unless a block like this one, of this phase, ended."""
    if is_source and not index_is_whole(folder, phase):
        shutil.rmtree(folder, ignore_errors=True)  # megatron takes a file torn by a kill for a whole one
    yield folder
    if is_source:
        rundir.mark_done(folder, fingerprint(phase))


def _layout(config: MidTrainConfig, here: Place, platform: Platform) -> str:
    p = config.parallel
    return (
        f"tensor {p.tensor} pipeline {p.pipeline}x{p.virtual_pipeline or 1} context {p.context} "
        f"data {here.data_ranks} layers {platform.layer_family}"
    )


def _write_records(config: MidTrainConfig, inputs: Inputs, platform: Platform, run: Path) -> None:
    """config.json, environment.json, plan.txt, lineage.json and the base's licence, in the run folder. Rank 0 only."""
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
    lineage.write(run, checkpoint.link(config, inputs.parent, TrainState(data=inputs.mixture.identities)))
    if inputs.start_folder is not None:
        lineage.copy_licence(inputs.start_folder, run)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
