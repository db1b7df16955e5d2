"""The data of a stage's phase: its sequences by their numbers in the stage, and the ledger that counts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.budget.ledger import Ledger, Phase
from megatron_octo.data.loader import build_dataset

if TYPE_CHECKING:
    import torch
    from megatron.core.datasets.blended_dataset import BlendedDataset

    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.data.mixture import Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseDataset:
    """The sequences that a stage reads from its `first` on."""

    blend: BlendedDataset
    first: int

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self.blend[number - self.first]
        return sample

    def identity(self, number: int) -> tuple[int, int, int]:
        """(shard, block of its stream, sample of the block's index) of a sequence."""
        shard = int(self.blend.dataset_index[number - self.first])
        return shard, *self.blend.datasets[shard].identity(self.blend.dataset_sample_index[number - self.first])


def open_phase(
    config: MidTrainConfig, mixture: Mixture, phase: Phase, *, cache: Path, reads_data: bool = True
) -> PhaseDataset | None:
    """The sequences of the phase, to the stage's end; None on a rank with `reads_data` False. All ranks call it.

    Their index is in `cache`, where rank 0 builds what is missing.
    """
    blend = build_dataset(
        mixture,
        num_sequences=_num_sequences(config, phase),
        seq_length=config.data.seq_length,
        seed=config.data.shuffle_seed,
        cache=cache,
        reads_data=reads_data,
        read_before=phase.streams,
    )
    return None if blend is None else PhaseDataset(blend=blend, first=phase.start_sequences)


def open_ledger(config: MidTrainConfig, mixture: Mixture, phases: tuple[Phase, ...], dataset: PhaseDataset) -> Ledger:
    """The ledger of a stage that reads `dataset` in the last of its phases."""
    return Ledger(
        phases=phases,
        available=mixture.tokens,
        streams=[each.stream for each in dataset.blend.datasets],
        source_of=[shard.source for shard in mixture.shards],
        order=dataset.blend.dataset_index,
        num_sequences=_num_sequences(config, phases[-1]),
        seq_length=config.data.seq_length,
    )


def _num_sequences(config: MidTrainConfig, phase: Phase) -> int:
    return config.num_steps * config.budget.batch_sequences - phase.start_sequences
