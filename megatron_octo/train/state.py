"""Where a stage stands: what `state.json` of a save holds beside the tensors."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from megatron_octo.budget.watch import WatchState
from megatron_octo.config.base import Settings, read_settings, to_dict
from megatron_octo.errors import OctoError
from megatron_octo.rundir import DONE, step_folder, write_json

FILE = "state.json"
UNREADABLE = (OctoError, TypeError, ValueError, LookupError)
"""What reading a save's records raises, whatever a changed byte makes of their JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState(Settings):
    """Progress of a stage. The rate, the data position and the ledger follow from it."""

    step: int = 0
    """Optimizer steps done."""
    consumed_sequences: int = 0
    """Sequences read by all ranks together: the position in the data."""
    tokens: int = 0
    """Tokens read in this stage."""
    time_s: float = 0.0
    """Seconds of training, earlier attempts included."""
    layout: str = ""
    """The ranks and layers that saved it; random states and layers' own records come back only into the same ones."""
    data: tuple[tuple[str, str], ...] = ()
    """(source, identity of its data set), as `Mixture.identities`: a resume goes on with the same or not at all."""
    tokenizer_sha256: str = ""
    """The tokenizer of the data, as `Mixture.tokenizer_sha256`: a branch goes on with the same or not at all."""
    watch: WatchState = field(default_factory=WatchState)
    """What the steps so far looked like, and which of them are left out."""

    def write(self, folder: Path) -> None:
        """Write `state.json`."""
        write_json(folder / FILE, to_dict(self))


def read_state(save: Path) -> TrainState:
    """The state in a save."""
    return read_settings(TrainState, save / FILE)


def readable_states(run: Path) -> dict[int, TrainState]:
    """The states of a run's whole saves, by their steps; saves whose state cannot be read are left out."""
    states = {}
    for step in saved_steps(run):
        with contextlib.suppress(*UNREADABLE):
            states[step] = read_state(step_folder(run, step))
    return states


def saved_steps(run: Path) -> list[int]:
    """Steps of a run's whole saves, in order. A torn save has no DONE, or still its temporary name."""
    return sorted(int(done.parent.name[5:]) for done in (run / "checkpoints").glob(f"step_????????/{DONE}"))


def latest_save(run: Path) -> Path | None:
    """The last whole save of a run, None if it has none."""
    steps = saved_steps(run)
    return step_folder(run, steps[-1]) if steps else None
