"""One shard's samples: megatron's GPTDataset with our index under it.

megatron's own builds the index in several times the time and memory, and takes files torn by a kill for whole ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.console import logger, rank
from megatron_octo.data.index import Array, IndexFiles, IndexOrder, open_index

if TYPE_CHECKING:
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
