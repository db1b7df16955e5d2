"""This rank's place in the layout, its part of the model, and the collectives of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_octo.model.build import build_model

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig
    from megatron_octo.platform import Platform


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands; the model-parallel groups know it, this names it."""

    rank: int
    data_rank: int
    data_ranks: int
    reads_data: bool
    """Whether this rank holds the embedding or the output layer."""
    is_source: bool
    """Rank 0: speaks, writes the run folder, and reads data."""


def place() -> Place:
    """This rank's place, from megatron's groups."""
    import torch.distributed as dist
    from megatron.core import parallel_state as groups

    return Place(
        rank=dist.get_rank(),
        data_rank=groups.get_data_parallel_rank(),
        data_ranks=groups.get_data_parallel_world_size(),
        reads_data=groups.is_pipeline_first_stage() or groups.is_pipeline_last_stage(),
        is_source=dist.get_rank() == 0,
    )


def build_chunks(config: MidTrainConfig, platform: Platform) -> list[Any]:
    """This rank's model chunks: one, or `virtual_pipeline` many. All ranks call it."""
    from megatron.core import parallel_state as groups

    virtual = config.parallel.virtual_pipeline
    return [
        build_model(
            config.model,
            platform=platform,
            parallel=config.parallel,
            precision=config.precision,
            compute=config.compute,
            pre_process=groups.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=groups.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in (range(virtual) if virtual else [None])
    ]


def wrap_chunks(chunks: Sequence[Any], config: MidTrainConfig) -> list[Any]:
    """The chunks in megatron's data-parallel wrapper, their gradients reduced in fp32. All ranks call it."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer.module import Float16Module

    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            settings,
            Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk,
            disable_bucketing=index > 0,  # later chunks' reductions overlap with the pipeline itself
        )
        for index, chunk in enumerate(chunks)
    ]
    no_sync = [each.no_sync for each in wrapped]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def bare(wrapped: Any) -> Any:
    """The GPTModel inside megatron's wrappers."""
    while hasattr(wrapped, "module"):
        wrapped = wrapped.module
    return wrapped


def mean_loss(parts: Sequence[Any], device: str) -> float:
    """The mean loss of a step over all tokens that count, 0 if none does. All ranks call it.

    One sum over all ranks of [loss sum, tokens]: pipeline stages without the loss add zeros, and the equal
    copies of tensor-parallel ranks cancel in the quotient.

    Args:
        parts: [loss sum, tokens] of each micro-batch; empty on ranks without the output layer.
        device: where to put the sum.
    """
    import torch
    import torch.distributed as dist

    total = torch.stack(list(parts)).sum(0) if parts else torch.zeros(2, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    loss, tokens = total.tolist()
    return float(loss / tokens) if tokens else 0.0


def from_source(value: Any) -> Any:
    """Rank 0's `value`, on every rank. All ranks call it."""
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
