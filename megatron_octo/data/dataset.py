"""One shard's samples: megatron's GPTDataset with our index under it, read from the first or from where others stopped.

megatron's own builds the index in several times the time and memory, and takes files torn by a kill for whole ones.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.budget.ledger import Block, Stream
from megatron_octo.console import logger, rank
from megatron_octo.data.index import Array, IndexFiles, IndexOrder, open_index

if TYPE_CHECKING:
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset

SAYS_AFTER_S = 2.0


@functools.cache
def packed_dataset_class(answers_only: frozenset[str] = frozenset()) -> type[GPTDataset]:
    """The class of data set that training reads; its config must have a `path_to_cache`.

    Args:
        answers_only: shards, as paths without .bin and .idx, whose tokens count in the loss where PREFIX.loss
            (uint8, one a token in the order of the .bin) has 1.
    """
    import numpy
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    class PackedDataset(GPTDataset):
        """Documents end to end, cut into samples."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            marked = self.dataset_path in answers_only
            marks: Any = numpy.memmap(f"{self.dataset_path}.loss", numpy.uint8, "r") if marked else None
            self._marks = marks

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            sample: dict[str, torch.Tensor] = super().__getitem__(number)
            if self._marks is not None:  # a new tensor: megatron gives the first sample's to later ones
                sample["loss_mask"] = sample["loss_mask"] * torch.from_numpy(self._marks_of(number)[1:])
            return sample

        def _marks_of(self, number: int) -> Array:
            """uint8 [s + 1], of the sample's tokens and the one after them, found as megatron finds the tokens."""
            index, entry = self.dataset.index, int(self.shuffle_index[number])
            (first, start), (last, stop) = self.sample_index[entry : entry + 2].tolist()
            documents = self.document_index[first : last + 1]
            begins = index.sequence_pointers[documents] // numpy.dtype(index.dtype).itemsize
            ends = begins + index.sequence_lengths[documents]
            ends[-1] = begins[-1] + stop + 1
            begins[0] += start
            return numpy.concatenate([self._marks[begin:end] for begin, end in zip(begins, ends, strict=True)])

        def _build_document_sample_shuffle_indices(self) -> tuple[Array, Array, Array]:
            config = self.config
            name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
            return open_index(
                IndexFiles(folder=Path(config.path_to_cache), name=name),
                IndexOrder(
                    prefix=Path(self.dataset.path_prefix),
                    documents=self.indices,
                    num_samples=self.num_samples,
                    seq_length=config.sequence_length,
                    seed=config.random_seed,
                    extra_token=config.add_extra_token_to_sequence,
                    drop_last_partial=self.index_split != Split.valid or config.drop_last_partial_validation_sequence,
                ),
                self.unique_description,
                builds=not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0,
            )

    return PackedDataset


def stream_dataset_class(answers_only: frozenset[str], read_before: Sequence[Stream]) -> type[Any]:
    """The class of data set that a blend mixes: the samples of a shard that are unread.

    They are those left of the blocks begun before, then those of a block of its own. Without any before, that block
    alone is what megatron reads.

    Args:
        answers_only: as of `packed_dataset_class`.
        read_before: what was.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    packed, before = packed_dataset_class(answers_only), {stream.prefix: stream for stream in read_before}

    class StreamDataset:
        """A shard, read on."""

        build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)
        numel_low_level_dataset = staticmethod(GPTDataset.numel_low_level_dataset)

        def __init__(self, *arguments: Any) -> None:
            shard, path, documents, num_samples, split, config = arguments

            def make(block: Block) -> GPTDataset:
                seeded = copy.copy(config)
                seeded.random_seed = block.seed
                return packed(shard, path, documents, block.num_samples, split, seeded)

            prefix = Path(path).resolve()
            begun = before.get(prefix, Stream(prefix=prefix, blocks=(), used=0))
            self._blocks = [make(block) for block in begun.blocks]
            missing = num_samples + begun.used - sum(len(block) for block in self._blocks)
            own = Block(num_samples=missing, seed=config.random_seed + len(begun.blocks))
            if missing > 0:
                self._blocks.append(make(own))
            self._ends = list(itertools.accumulate(len(block) for block in self._blocks))
            self.stream = replace(begun, blocks=(*begun.blocks, own) if missing > 0 else begun.blocks)
            """How far the shard was read before, and the blocks that this reads."""
            self.index_split = split
            self.unique_identifiers = {**self._blocks[-1].unique_identifiers, "stream": repr(self.stream)}

        def __len__(self) -> int:
            return self._ends[-1] - self.stream.used

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            block, entry = self._locate(number)
            sample: dict[str, torch.Tensor] = self._blocks[block][entry]
            return sample

        def identity(self, number: int) -> tuple[int, int]:
            """(block, sample of its index) of a sample."""
            block, entry = self._locate(number)
            return block, int(self._blocks[block].shuffle_index[entry])

        def _locate(self, number: int) -> tuple[int, int]:
            number = int(number) + self.stream.used
            block = bisect.bisect_right(self._ends, number)
            return block, number - (self._ends[block - 1] if block else 0)

    return StreamDataset


@contextlib.contextmanager
def waiting_for_rank_0(cache: Path) -> Iterator[None]:
    """Say, if the block takes long on another rank than 0, what it waits for: one line from each node."""
    first_to_wait = rank() == 1 or (rank() > 0 and os.environ.get("LOCAL_RANK") == "0")
    log = logger(__name__)
    timer = threading.Timer(SAYS_AFTER_S, log.warning, ("waiting for rank 0 to build the sample index in %s", cache))
    timer.daemon = True
    if first_to_wait:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
