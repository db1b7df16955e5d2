"""Loss on held-out documents, source by source: always the same sequences, in every layout.

Nothing of the training is touched: no random state, no position in its data.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_octo.data.loader import Loader, build_dataset
from megatron_octo.train.step import forward_backward

if TYPE_CHECKING:
    import torch
    from megatron.core.datasets.blended_dataset import BlendedDataset

    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.data.mixture import Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """The first `count` sequences of a data set; the numbers after them give ones that do not count in the loss."""

    dataset: BlendedDataset
    count: int

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        row: dict[str, torch.Tensor] = self.dataset[min(number, self.count - 1)]
        return row if number < self.count else {**row, "loss_mask": row["loss_mask"].new_zeros(len(row["loss_mask"]))}


def held_out_loaders(
    held_out: Mapping[str, Mixture], like: Loader, config: MidTrainConfig, *, cache: Path, is_source: bool
) -> dict[str, Loader]:
    """A loader of each source's held-out sequences; one step of it is all of them. All ranks call it.

    Args:
        held_out: from `read_held_out`.
        like: the training's loader.
        cache: a folder for the indexes; rank 0 makes them anew, since a killed run may have left half of one.
    """
    if is_source:
        shutil.rmtree(cache, ignore_errors=True)
    loaders = {}
    for name, mixture in held_out.items():
        count = min(config.validate.sequences, (mixture.tokens[0] - 1) // config.data.seq_length)
        dataset = build_dataset(
            mixture,
            num_sequences=count,
            seq_length=config.data.seq_length,
            seed=config.data.shuffle_seed,
            cache=cache,
            reads_data=like.dataset is not None,
        )
        rows = like.data_ranks * like.micro_batch_sequences
        if config.parallel.virtual_pipeline:
            rows *= config.parallel.pipeline  # the interleaved schedule takes so many micro-batches at a time
        loaders[name] = replace(
            like,
            dataset=Filled(dataset=dataset, count=count) if dataset is not None else None,
            num_micro_batches=-(-count // rows) * rows // (like.data_ranks * like.micro_batch_sequences),
        )
    return loaders


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What is validated, and when."""

    wrapped: Sequence[Any]
    loaders: Mapping[str, Loader]
    config: MidTrainConfig
    schedule: Callable[..., list[Any]]

    def after(self, step: int) -> dict[str, float]:
        """The mean loss of each source's held-out tokens if it is due after `step`, else nothing. All ranks call it."""
        import torch

        every, last = self.config.validate.every_steps, step == self.config.num_steps
        if every is None or (step % every and not last):
            return {}
        for chunk in self.wrapped:
            chunk.eval()
        with torch.no_grad():
            losses = {
                name: forward_backward(self.wrapped, loader, 0, self.config, self.schedule, forward_only=True)[0]
                for name, loader in self.loaders.items()
            }
        for chunk in self.wrapped:
            chunk.train()
        return losses
