"""Proof that a run goes on exactly: `octo train RECIPE --verify-resume`.

The batches after its last save, as loaders of several layouts take them from the run's own index, are compared with
those of an index built afresh, at the position that the step counts. Reads only; needs no GPU and no process group.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo import console, rundir
from megatron_octo.config.base import Settings, to_dict
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.data.loader import Loader
from megatron_octo.data.mixture import Mixture, check_unchanged, read_mixture
from megatron_octo.data.phase import PhaseDataset, open_phase
from megatron_octo.data.verify import verify
from megatron_octo.errors import BadInput
from megatron_octo.train.run import FIX, MAY_DIFFER, REWEIGHED, finished, index_is_whole
from megatron_octo.train.start import data_phases
from megatron_octo.train.state import read_state, readable_states

if TYPE_CHECKING:
    import torch

DATA_RANKS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutProof(Settings):
    """What loaders of one layout read."""

    data_ranks: int
    micro_batch_sequences: int
    differs_at: int | None
    """The first batch with other ids or tokens, by its step; None if all are the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof(Settings):
    """What `verify_resume` found."""

    save: Path
    first_batch: int
    """By its step: the first after the save."""
    last_batch: int
    sha256: str
    """Over the ids and tokens of all these batches."""
    layouts: tuple[LayoutProof, ...]
    holds: bool
    """Whether all layouts read those batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A data set that notes which sequences are taken."""

    dataset: PhaseDataset
    ids: list[tuple[int, ...]] = field(default_factory=list)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        self.ids.append(self.dataset.identity(number))
        return self.dataset[number]


def verify_resume(config: MidTrainConfig, *, num_batches: int) -> Proof:
    """Compare the `num_batches` global batches after the run's last save, or as many as are left.

    Raises:
        BadInput: the run has no save that batches follow, was made with other settings, or its data were prepared anew.
        VerificationError: a data set is damaged.
    """
    run, save = rundir.run_folder(config.name), _save(config)
    mixture, state, step = _mixture(config, save), read_state(save), int(save.name[5:])
    phase, count = data_phases(config, save, None)[-1], min(num_batches, config.num_steps - step)
    with tempfile.TemporaryDirectory() as temporary:
        fresh = open_phase(config, mixture, phase, cache=Path(temporary))
        kept = run / "index" if index_is_whole(run / "index", phase) else Path(temporary)
        own = open_phase(config, mixture, phase, cache=kept)
        assert fresh is not None
        assert own is not None
        right = list(_show(_of_index(fresh, config, step), count, "the index built afresh"))
        layouts = []
        for data_ranks, rows in _layouts(config):
            batches = _of_loaders(own, config, mixture, state.consumed_sequences, data_ranks=data_ranks, rows=rows)
            pairs = zip(right, _show(batches, count, f"{data_ranks} data-parallel ranks"), strict=True)
            differs_at = next((step + 1 + at for at, (one, other) in enumerate(pairs) if one != other), None)
            layouts.append(LayoutProof(data_ranks=data_ranks, micro_batch_sequences=rows, differs_at=differs_at))
    return Proof(
        save=save,
        first_batch=step + 1,
        last_batch=step + count,
        sha256=hashlib.sha256("".join(right).encode()).hexdigest(),
        layouts=tuple(layouts),
        holds=all(each.differs_at is None for each in layouts),
    )


def _save(config: MidTrainConfig) -> Path:
    """The run's last save that batches follow."""
    run = rundir.run_folder(config.name)
    finished(config)
    steps = [step for step in readable_states(run) if step < config.num_steps]
    if not steps:
        raise BadInput(f"{run} has no save that batches follow", fix="train it until it has saved")
    save = rundir.step_folder(run, steps[-1])
    rundir.check_config(save, to_dict(config), fix=FIX, may_differ=MAY_DIFFER + REWEIGHED)
    return save


def _mixture(config: MidTrainConfig, save: Path) -> Mixture:
    """The run's data, every byte of them as it was at the save."""
    mixture = read_mixture(config.data, model_vocab_size=config.model.vocab_size)
    check_unchanged(mixture, read_state(save).data, save)
    for folder in {source.path: None for source in config.data.sources}:
        verify(folder)
    return mixture


def _layouts(config: MidTrainConfig) -> Iterator[tuple[int, int]]:
    """(data ranks, sequences of a micro-batch) that the batch divides into."""
    rows = config.budget.micro_batch_sequences
    for data_ranks in DATA_RANKS:
        if config.budget.batch_sequences % (data_ranks * rows) == 0:
            yield data_ranks, rows
    if rows > 1:
        yield 1, 1


def _of_index(dataset: PhaseDataset, config: MidTrainConfig, step: int) -> Iterator[str]:
    """A digest of each batch after `step`, taken one sequence after the other."""
    size = config.budget.batch_sequences
    while True:
        numbers = range(step * size, (step + 1) * size)
        yield _digest([dataset.identity(number) for number in numbers], (dataset[each]["tokens"] for each in numbers))
        step += 1


def _of_loaders(
    dataset: PhaseDataset, config: MidTrainConfig, mixture: Mixture, consumed: int, *, data_ranks: int, rows: int
) -> Iterator[str]:
    """A digest of each batch after `consumed` sequences, as the ranks' loaders read it together."""
    watched = Watched(dataset=dataset)
    loaders = [
        Loader(
            dataset=watched,
            data_rank=rank,
            data_ranks=data_ranks,
            micro_batch_sequences=rows,
            num_micro_batches=config.budget.batch_sequences // (data_ranks * rows),
            device="cpu",
            cut_after=None if config.data.across_documents else mixture.eos_id,
        )
        for rank in range(data_ranks)
    ]
    while True:
        watched.ids.clear()
        rounds = zip(*(loader.step(consumed) for loader in loaders), strict=True)
        tokens = [batch["tokens"] for micro_batches in rounds for batch in micro_batches]
        yield _digest(watched.ids, tokens)
        consumed += config.budget.batch_sequences


def _digest(ids: list[tuple[int, ...]], tokens: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for each in tokens:
        digest.update(each.numpy().tobytes())
    digest.update(repr(ids).encode())
    return digest.hexdigest()


def _show(digests: Iterator[str], count: int, title: str) -> Iterator[str]:
    return console.progress(itertools.islice(digests, count), total=count, title=title)
