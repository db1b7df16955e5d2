"""Prepared shards -> batches, by megatron's blended GPT data sets.

The position in the data is one number, the sequences consumed so far: step, micro-batch and rank follow from
it, so another number of ranks goes on with exactly the next sequences.

Shapes: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_octo.budget.ledger import Stream
from megatron_octo.data.borders import cut_at_documents
from megatron_octo.data.dataset import stream_dataset_class, waiting_for_rank_0

if TYPE_CHECKING:
    import torch
    from megatron.core.datasets.blended_dataset import BlendedDataset

    from megatron_octo.data.mixture import Mixture


def sequence_numbers(
    consumed_sequences: int, micro_batch: int, *, data_rank: int, data_ranks: int, micro_batch_sequences: int
) -> range:
    """Which sequences of the stage a data rank reads for a micro-batch of the step after `consumed_sequences`."""
    start = consumed_sequences + (micro_batch * data_ranks + data_rank) * micro_batch_sequences
    return range(start, start + micro_batch_sequences)


def build_dataset(
    mixture: Mixture,
    *,
    num_sequences: int,
    seq_length: int,
    seed: int,
    cache: Path,
    reads_data: bool,
    read_before: Sequence[Stream] = (),
) -> BlendedDataset | None:
    """Sequences in their shuffled, blended order; None on a rank with `reads_data` False.

    All ranks call it together, and rank 0 must read: it writes the index files into `cache`, the others load
    them. Documents are packed end to end and cut; a source that is too short is repeated, reshuffled each time.
    Of a shard in `read_before` the sequences read then come first no more: those after them do.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(shard.prefix) for shard in mixture.shards], [shard.weight for shard in mixture.shards]),
        split="1,0,0",
        tokenizer=_TokenizerIdentity(mixture),
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [num_sequences, 0, 0]
    answers_only = frozenset(str(shard.prefix) for shard in mixture.shards if shard.loss == "answers")
    dataset_class = stream_dataset_class(answers_only, read_before)
    builder = BlendedMegatronDatasetBuilder(dataset_class, sizes, lambda: reads_data, config)
    with waiting_for_rank_0(cache):
        dataset: BlendedDataset | None = builder.build()[0]
    return dataset


class Sequences(Protocol):
    """What loaders read: sequences by their numbers in the stage."""

    def __getitem__(self, number: int, /) -> dict[str, torch.Tensor]:
        """`tokens`, `labels`, `loss_mask`, `position_ids`, each [s]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """What one data rank reads."""

    dataset: Sequences | None
    """From `open_phase`; None on a rank that reads nothing."""
    data_rank: int
    data_ranks: int
    micro_batch_sequences: int
    num_micro_batches: int
    """Micro-batches of this rank in a step."""
    device: str
    cut_after: int | None = None
    """The id that ends a document, where attention and positions are cut; None to go across documents."""

    def step(self, consumed_sequences: int) -> Iterator[dict[str, torch.Tensor]]:
        """The micro-batches of one step: `tokens`, `labels`, `loss_mask`, `position_ids`, each [b, s].

        Cut at documents, each is as `cut_at_documents` returns it, with `max_seqlen` left on the CPU.
        """
        for micro_batch in range(self.num_micro_batches):
            yield self._micro_batch(
                sequence_numbers(
                    consumed_sequences,
                    micro_batch,
                    data_rank=self.data_rank,
                    data_ranks=self.data_ranks,
                    micro_batch_sequences=self.micro_batch_sequences,
                )
            )

    def _micro_batch(self, numbers: range) -> dict[str, torch.Tensor]:
        import torch

        assert self.dataset is not None, "this rank reads no data"
        rows: list[dict[str, Any]] = [self.dataset[number] for number in numbers]
        batch = {
            key: torch.stack([row[key] for row in rows]) for key in ("tokens", "labels", "loss_mask", "position_ids")
        }
        if self.cut_after is not None:
            batch = cut_at_documents(batch, self.cut_after)
        return {
            key: value if key == "max_seqlen" else value.to(self.device, non_blocking=True)
            for key, value in batch.items()
        }


class _TokenizerIdentity:
    """What megatron's data sets ask of a tokenizer: nothing is tokenised here."""

    def __init__(self, mixture: Mixture) -> None:
        self.vocab_size = mixture.vocab_size
        self.eod = mixture.eos_id
        self.pad = -1  # no id: packed sequences have no padding
        # a part of the index cache's key: an index of data that was prepared anew is another one
        self.unique_identifiers = {"tokenizer": mixture.tokenizer_sha256, "data": mixture.identities}
