"""This rank's place in the layout, its part of the model, and the collectives of the loop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from megatron_octo.errors import OctoError
from megatron_octo.model.build import build_model
from megatron_octo.train.votes import Votes

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


def build_chunks(config: MidTrainConfig, platform: Platform, *, num_ids: int) -> list[Any]:
    """This rank's model chunks: one, or `virtual_pipeline` many; of a tokenizer of `num_ids`. All ranks call it."""
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
            num_ids=num_ids,
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

    parallel = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_param_gather=chunks[0].config.fp8_param,  # else the update never reaches weights that are kept in FP8
    )
    if parallel.fsdp:
        wrapped = [_fully_sharded(chunk, settings) for chunk in chunks]
    else:
        wrapped = [
            DistributedDataParallel(
                chunk.config,
                settings,
                _in_its_precision(chunk),
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


def _fully_sharded(chunk: Any, settings: Any) -> Any:
    """The chunk in torch's FSDP, as megatron wraps it: a layer's weights are gathered when it runs, and dropped again.

    What is in no layer stays gathered through a step, since tied embeddings are read at both ends.
    """
    from megatron.core.distributed import TorchFullyShardedDataParallel
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class FullySharded(TorchFullyShardedDataParallel):
        def scale_gradients(self, scaling_factor: float) -> None:
            """By the tokens of all ranks; FSDP has divided the sum by its ranks."""
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scaling_factor * self.process_group.size())

    return FullySharded(chunk.config, settings, _in_its_precision(chunk), {TransformerLayer})


def _in_its_precision(chunk: Any) -> Any:
    from megatron.core.transformer.module import Float16Module

    return Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk


def bare(wrapped: Any) -> Any:
    """The GPTModel inside megatron's wrappers."""
    while hasattr(wrapped, "module"):
        wrapped = wrapped.module
    return wrapped


def mean_loss(parts: Sequence[Any], device: str, votes: Callable[[], Votes]) -> tuple[float, Votes]:
    """The mean loss of a step over all tokens that count, 0 if none does; and the votes of all. All ranks call it.

    One sum over all ranks of [loss sum, tokens, votes]: pipeline stages without the loss add zeros, and the equal
    copies of tensor-parallel ranks cancel in the quotient.

    Args:
        parts: [loss sum, tokens] of each micro-batch; empty on ranks without the output layer.
        device: where to put the sum.
        votes: gives this rank's; called as late as can be, when its part of the step is computed.
    """
    import torch
    import torch.distributed as dist

    sums = torch.stack(list(parts)).sum(0) if parts else torch.zeros(2, dtype=torch.float64, device=device)
    ours = sums.tolist()  # waits for the device
    total = torch.tensor([*ours, *votes()], dtype=sums.dtype, device=sums.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    loss, tokens, *asked = total.tolist()
    return float(loss / tokens) if tokens else 0.0, Votes(*map(int, asked))


def from_source[T](value: T) -> T:
    """Rank 0's `value`, on every rank. All ranks call it."""
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def together[T](what: str, work: Callable[[], T], *, fix: str) -> list[T]:
    """What `work` returns on each rank, in the order of the ranks, on every rank. All ranks call it.

    Raises:
        OctoError: `what`, on all ranks alike, because `work` failed on one.
    """
    import torch.distributed as dist

    result, failure = None, ""
    try:
        result = work()
    except Exception as error:
        failure = f"rank {dist.get_rank()} on {socket.gethostname()}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, failure))
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise OctoError(f"{what}: {'; '.join(failures)}", fix=fix)
    return [result for result, _ in outcomes]


def on_source[T](what: str, work: Callable[[], T], *, fix: str) -> T:
    """What `work` returns on rank 0, on every rank. All ranks call it.

    Raises:
        OctoError: `what`, on all ranks alike, because `work` failed.
    """
    import torch.distributed as dist

    return cast("T", together(what, work if dist.get_rank() == 0 else lambda: None, fix=fix)[0])
