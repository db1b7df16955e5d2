"""The saves of a run: when one is due, one at a time on its way, which stay, which is good to go on from.

A run that was cut off goes on from its newest save whose checksums hold. A damaged one is set aside, never loaded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo import checksums, lineage, rundir
from megatron_octo.budget.saves import is_due, superseded
from megatron_octo.config.base import to_dict
from megatron_octo.console import logger
from megatron_octo.errors import BadInput
from megatron_octo.platform.process_group import world
from megatron_octo.train.checkpoint import FIX, Writing
from megatron_octo.train.distributed import from_source, on_source, together
from megatron_octo.train.state import saved_steps
from megatron_octo.train.votes import Votes

if TYPE_CHECKING:
    from megatron_octo.budget.ledger import Ledger
    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.train.observer import Observer
    from megatron_octo.train.state import TrainState

STEPS = "step_????????"
LATEST = "latest"
"""A file that names the last step, for people and other tools."""
DAMAGED = "damaged_"
"""Before the name of a save that was set aside."""


class Saver:
    """Saves a run. All ranks have one and call it alike."""

    def __init__(
        self,
        run: Path,
        config: MidTrainConfig,
        *,
        chunks: Sequence[Any],
        wrapped: Sequence[Any],
        optimizer: Any,
        parent: lineage.Lineage | None,
        observer: Observer,
    ) -> None:
        import torch.distributed as dist

        self._run, self._config, self._observer = run, config, observer
        self._parts: dict[str, Any] = {"chunks": chunks, "wrapped": wrapped, "optimizer": optimizer, "parent": parent}
        self._is_source = dist.get_rank() == 0
        self._writing: Writing | None = None
        self._last_s = time.monotonic()
        self._asked_stop = self._asked_save = False

    def votes(self, *, stop: bool) -> Votes:
        """What this rank asks for at the step under way; `stop` says whether it was told to end by a signal.

        Rank 0 alone looks at the run's folder and at the clock. It asks again until it was heard: nobody is at a step
        that is left out or rolled back.
        """
        if self._is_source:
            minutes = self._config.save.every_minutes
            if not self._asked_stop and (self._run / rundir.STOP).exists():
                self._asked_stop = True  # it stays until it is heeded, maybe by a rerun
                logger(__name__).info("found %s: a last save, and the end", self._run / rundir.STOP)
            self._asked_save |= rundir.take_file(self._run / rundir.SAVE) or (
                minutes is not None and time.monotonic() - self._last_s >= 60 * minutes
            )
        return Votes(
            stop=stop or self._asked_stop,
            save=self._asked_save,
            writing=self._writing is not None and not self._writing.is_written,
        )

    def step_ended(self, state: TrainState, votes: Votes, ledger: Ledger | None) -> TrainState:
        """Finish a save that, by `votes`, all ranks have written; begin the one that is due. Returns the state, timed.

        Rank 0 alone has the `ledger`.
        """
        if not votes.writing:
            self.wait()
        if self._is_due(state, votes):
            state = replace(state, time_s=self._observer.save_begins())
            self.save(state, to_dict(ledger.record(state.consumed_sequences)) if ledger else {})
        return state

    def _is_due(self, state: TrainState, votes: Votes) -> bool:
        config, batch_tokens = self._config, self._config.batch_tokens
        asked = bool(votes.stop or votes.save or state.step == config.num_steps)
        marked = config.marks.reached(state.tokens - batch_tokens, state.tokens)
        return asked or marked or is_due(config.save, state.step, batch_tokens=batch_tokens)

    def save(self, state: TrainState, ledger: dict[str, Any]) -> None:
        """Begin to save `state`, once an earlier save has finished.

        Raises:
            OctoError: the earlier save, or this one, cannot be written.
        """
        self.wait()
        folder = rundir.step_folder(self._run, state.step)
        self._writing = Writing(folder, state, config=self._config, ledger=ledger, **self._parts)
        self._last_s, self._asked_save = time.monotonic(), False

    def wait(self) -> None:
        """Wait for the save under way, if any, to be whole; then remove those that it supersedes.

        Raises:
            OctoError: it cannot be written.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        writing.finish()
        on_source(f"{self._run}/checkpoints is not in order", lambda: self._tidy(writing.folder), fix=FIX)
        logger(__name__).info("saved %s", writing.folder)
        self._observer.saved()

    def end(self) -> None:
        """Wait for the save under way, if any; a STOP file that asked for it is heeded then, and removed.

        Raises:
            OctoError: it cannot be written.
        """
        self.wait()
        if self._asked_stop:
            rundir.take_file(self._run / rundir.STOP)

    def _tidy(self, newest: Path) -> None:
        """Name the newest save, and remove what it supersedes and what killed attempts left."""
        rundir.write_atomic(newest.with_name(LATEST), f"{_step(newest)}\n")
        steps = saved_steps(self._run)
        gone = superseded(self._config.save, steps, batch_tokens=self._config.batch_tokens)
        in_use = self._observer.saves_in_use()
        kept = {rundir.step_folder(self._run, step) for step in steps if step not in gone or step in in_use}
        for path in (*newest.parent.glob(STEPS), *newest.parent.glob(".*")):
            if path not in kept:
                _remove(path)


def newest_good(run: Path) -> Path | None:
    """The newest save of a run whose checksums hold, None for a run without saves. All ranks call it.

    Each rank reads its share of the files. Damaged saves after that one are set aside, with a warning each.

    Raises:
        BadInput: there are saves and none is good; nothing was changed.
    """
    fix = "bring one back from a copy; to start over, give the run another name (--name)"
    good, damaged = _newest_good(run, fix=fix)
    if good is not None:
        on_source(f"{run}/checkpoints is not in order", lambda: _set_aside(damaged, good), fix=FIX)
    return good


def newest_good_of_parent(parent: Path) -> Path:
    """The newest save of another run whose checksums hold, with a warning for each damaged one after it.

    All ranks call it. The parent is only read.

    Raises:
        BadInput: it has none.
    """
    good, damaged = _newest_good(parent, fix="bring one back from a copy, or start from another run")
    assert good is not None, f"{parent} has no saves"
    if world().rank == 0:
        for folder, wrong in damaged:
            logger(__name__).warning(
                "%s is damaged (%s): this stage starts from the parent's step %s, not from its step %s",
                *(folder, wrong, f"{_step(good):,}", f"{_step(folder):,}"),
            )
    return good


def _newest_good(run: Path, *, fix: str) -> tuple[Path | None, list[tuple[Path, str]]]:
    """A run's newest save whose checksums hold, if there are saves, and the damaged ones after it, each with why."""
    damaged: list[tuple[Path, str]] = []
    for folder in from_source(sorted((run / "checkpoints").glob(STEPS), reverse=True)):
        wrong = _faults(folder)
        if not wrong:
            return folder, damaged
        damaged.append((folder, wrong))
    if damaged:
        lines = "\n".join(f"  {folder.name}: {wrong}" for folder, wrong in damaged)
        raise BadInput(f"{run} has saves, and none of them is good:\n{lines}", fix=fix)
    return None, []


def require_good(save: Path) -> None:
    """Refuse a save of another run whose checksums do not hold. All ranks call it.

    Raises:
        BadInput: so it is.
    """
    wrong = _faults(save)
    if wrong:
        steps = ", ".join(f"{step:,}" for step in saved_steps(save.parents[1]) if step != _step(save))
        raise BadInput(
            f"the save {save} is damaged: {wrong}",
            fix=f"start from another save of that run (--start.step); it has saves at steps {steps or '- none'}",
        )


def _faults(save: Path) -> str:
    """What is wrong with a save, empty if nothing is. All ranks call it; each reads a share."""
    import torch.distributed as dist

    part, parts = dist.get_rank(), dist.get_world_size()
    found = together(f"{save} was not read", lambda: checksums.faults(save, part=part, parts=parts), fix=FIX)
    return "; ".join(dict.fromkeys(fault for faults in found for fault in faults))


def _set_aside(damaged: Sequence[tuple[Path, str]], good: Path) -> None:
    for folder, wrong in damaged:
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        logger(__name__).warning("%s is damaged (%s): set aside as %s", folder, wrong, aside.name)
    if damaged:
        rundir.write_atomic(good.with_name(LATEST), f"{_step(good)}\n")


def _step(save: Path) -> int:
    return int(save.name.removeprefix("step_"))


def _remove(path: Path) -> None:
    """Remove a save, or a file; DONE first, so that no half of a save is ever selected."""
    if path.is_file():
        path.unlink()
    else:
        (path / rundir.DONE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
