"""Where a stage's weights and its position in the data come from: an import, a save of another run, its own last save.

Everything is checked before torch loads, and only read: a branch never writes to its parent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_octo import checksums, rundir
from megatron_octo.budget.ledger import Phase, Stream, next_phases, read_ledger
from megatron_octo.budget.schedule import rate_at
from megatron_octo.config.base import read_settings
from megatron_octo.config.train import FromImport, FromRun, MidTrainConfig
from megatron_octo.data import mix
from megatron_octo.data.mixture import Mixture, check_unchanged
from megatron_octo.errors import BadInput
from megatron_octo.model.weights import check_shape
from megatron_octo.train.state import UNREADABLE, read_state, readable_states, saved_steps

RECORDS = "*.json"
"""Of a save: what is checked before torch loads."""


def start_folder(config: MidTrainConfig, mixture: Mixture) -> Path | None:
    """The folder whose weights the stage starts from, None for random ones.

    Raises:
        BadInput: it is not there, not whole, or does not fit.
    """
    if isinstance(config.start, FromImport):
        folder = _import(config.start)
    elif isinstance(config.start, FromRun):
        folder = _parent_save(config.start, config.name)
        check_branch(config, config.start, mixture, folder)
    else:
        return None
    check_shape(config.model, folder)
    return folder


def check_parent(start: FromRun, config: MidTrainConfig) -> None:
    """Refuse a parent that the stage could not start from, its data aside.

    Raises:
        BadInput: it has no such save, or is another model.
    """
    check_shape(config.model, _parent_save(start, config.name))


def newest_readable(run: Path) -> Path | None:
    """The newest save of a run whose records can be read, None if there is none.

    Enough to check the settings by; whether a save is good to go on from, its checksums say (`train/saver.py`).
    """
    for step in reversed(saved_steps(run)):
        save = rundir.step_folder(run, step)
        with contextlib.suppress(*UNREADABLE):
            read_state(save)
            read_ledger(save)
            return save
    return None


def data_phases(config: MidTrainConfig, save: Path | None, start: Path | None) -> tuple[Phase, ...]:
    """The phases in which the stage reads its data.

    Args:
        config: the stage.
        save: its own, to go on from; None at its start.
        start: from `start_folder`.
    """
    if save is not None:
        return next_phases(config.data.sources, read_ledger(save), seq_length=config.data.seq_length)
    skips = isinstance(config.start, FromRun) and config.start.skip_consumed
    streams = read_ledger(start).streams if skips and start is not None else ()
    return (Phase(sources=config.data.sources, streams=streams),)


def check_budget(config: MidTrainConfig, mixture: Mixture, phase: Phase) -> None:
    """Refuse a phase that has nothing to read, or that reads a source too often.

    What was read before counts: by the stage, and by a parent that it reads on after.

    Raises:
        BadInput: so it is.
    """
    left = config.budget.train_tokens - phase.start_sequences * config.data.seq_length
    if left == 0:
        raise BadInput(
            f"{config.name} has read all its {config.budget.train_tokens:,} tokens: none is left to weigh anew",
            fix="go on with the settings of the run folder, without --reweigh",
        )
    read_before = _tokens_read(phase.streams, mixture, config.data.seq_length)
    plans = mix.plan(config.data, available=mixture.tokens, train_tokens=left, read_before=read_before)
    mix.check_repeats(plans, reader="before" if phase.start_sequences else "by the parent")


def shared_data(start: FromRun, mixture: Mixture, save: Path) -> str:
    """A sentence on the data sets that the branch shares with its parent."""
    read = {stream.prefix for stream in read_ledger(save).streams if stream.used}
    shared = sorted({mixture.names[each.source] for each in mixture.shards if each.prefix.resolve() in read})
    if not shared:
        return "reads no data set that the parent read"
    how = (
        "on from there, and again once none of it is unread"
        if start.skip_consumed
        else "from the beginning again (--start.skip-consumed goes on)"
    )
    return f"data sets that the parent read too: {', '.join(shared)}; this stage reads them {how}"


def _tokens_read(streams: Sequence[Stream], mixture: Mixture, seq_length: int) -> dict[str, int]:
    """Tokens of each source that were read, by its name."""
    used, read = {stream.prefix: stream.used for stream in streams}, dict.fromkeys(mixture.names, 0)
    for shard in mixture.shards:
        read[mixture.names[shard.source]] += used.get(shard.prefix.resolve(), 0) * seq_length
    return read


def _import(start: FromImport) -> Path:
    if not rundir.is_done(start.path):
        state = "is not finished: it has no DONE" if start.path.exists() else "does not exist"
        raise BadInput(
            f"start.path {start.path} {state}",
            fix=f"run `octo convert from-hf HF_FOLDER {start.path}`, or correct start.path",
        )
    return start.path


def _parent_save(start: FromRun, name: str) -> Path:
    """The save that is named, else the newest whose records are good; its weights are hashed later, by all ranks."""
    parent = rundir.run_folder(start.run)
    if start.run == name:
        raise BadInput(f"the run {name} cannot start from itself", fix="give the branch another name (--name)")
    if not start.names_save and not rundir.is_done(parent):
        state = "has not finished" if parent.exists() else "does not exist"
        raise BadInput(
            f"the parent run {parent} {state}",
            fix="train it to its end first (`octo train`), or name a save (--from RUN@TOKENS, or start.step)",
        )
    saves = {step: state.tokens for step, state in readable_states(parent).items()}
    if start.step is not None:
        which, found = f" at step {start.step:,}", [step for step in saves if step == start.step]
    elif start.tokens is not None:
        which, found = f" at {start.tokens:,} tokens", [step for step in saves if saves[step] == start.tokens]
    else:
        good = [step for step in saves if not checksums.faults(rundir.step_folder(parent, step), only=RECORDS)]
        which, found = " whose checksums hold", good
    if not found:
        listing = ", ".join(f"{tokens:,} tokens (step {step:,})" for step, tokens in saves.items())
        raise BadInput(f"the parent run {parent} has no save{which}", fix=f"its saves: {listing or 'none'}")
    return rundir.step_folder(parent, found[-1])


def check_branch(config: MidTrainConfig, start: FromRun, mixture: Mixture, save: Path) -> None:
    """Refuse a branch that its parent's save does not lead into.

    Raises:
        BadInput: the learning rate would jump, or the tokenizer changes; the moments are of another form; or the data
            to go on with are not the parent's.
    """
    parent, state = read_settings(MidTrainConfig, save / "config.json"), read_state(save)
    theirs = rate_at(parent.learning_rate, state.tokens, parent.budget.train_tokens)
    ours = rate_at(config.learning_rate, 0, config.budget.train_tokens)
    if not start.rate_jump and not math.isclose(ours, theirs, rel_tol=1e-12):
        raise BadInput(
            f"the learning rate would jump: {theirs:g} in {save}, {ours:g} at this stage's first step",
            fix=f"begin at {theirs:g} (learning_rate.peak, without warm-up), or allow it (--start.rate-jump)",
        )
    if state.tokenizer_sha256 not in ("", mixture.tokenizer_sha256):
        raise BadInput(
            f"{save} learned from another tokenizer's ids ({state.tokenizer_sha256[:12]}) than those of "
            f"data.tokenizer {config.data.tokenizer} ({mixture.tokenizer_sha256[:12]})",
            fix="prepare the sources with the parent's tokenizer",
        )
    kept, wanted = parent.parallel.distributed_optimizer, config.parallel.distributed_optimizer
    if start.optimizer and kept != wanted:
        raise BadInput(
            f"the moments in {save} were saved with parallel.distributed_optimizer {kept}, this run has {wanted}",
            fix="use the parent's setting, or start without its moments (start.optimizer False)",
        )
    before, now = parent.precision.dtype, config.precision.dtype
    if start.optimizer and not wanted and before != now:  # only the distributed optimizer keeps fp32 copies of both
        raise BadInput(
            f"the moments in {save} were saved with precision.dtype {before}, this run has {now}",
            fix="use the parent's setting, or start without its moments (start.optimizer False)",
        )
    if start.skip_consumed:
        check_unchanged(mixture, state.data, save)
        if parent.data.seq_length != config.data.seq_length:
            raise BadInput(
                f"start.skip_consumed counts sequences of {config.data.seq_length:,} tokens; those that {save} read "
                f"have {parent.data.seq_length:,}",
                fix="use the parent's data.seq_length, or read the sources from their beginning",
            )
        check_budget(config, mixture, data_phases(config, None, save)[-1])
