"""What two ranks do for `test_memory.py`, in one launch: build a stage's model and optimizer, layout after layout, and
write down what each rank holds; and how far the ranks of a pipeline run ahead.

Both call `main`. Each rank writes RANK.json: a row a case.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_octo import console, rundir
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import MidTrainConfig, ParallelConfig, PrecisionConfig
from tests.cpu.matrix import LAYOUTS
from tests.prepared import stage

TIED = ModelConfig(
    hidden_size=64,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    ffn_size=176,
    vocab_size=512,
    tied_embeddings=True,
    qkv_bias=True,
    max_positions=256,
)
MODELS = {"tied": TIED, "untied": replace(TIED, tied_embeddings=False, qkv_bias=False, qk_norm=True, head_dim=16)}
FOOTPRINT_LAYOUTS = {  # FSDP has no buffers to look into, and what it gathers comes and goes
    **{name: layout for name, layout in LAYOUTS.items() if not layout.fsdp},
    "dp2-whole": ParallelConfig(distributed_optimizer=False),
}
CASES = {
    f"{model}-{layout}-{dtype}": (model, layout, dtype)
    for model in MODELS
    for layout in FOOTPRINT_LAYOUTS
    for dtype in ("fp32", "bf16")
    if dtype == "bf16" or model == "tied"
}
SEQ_LENGTH = 128
PIPELINES = {"pp4": ParallelConfig(pipeline=4), "pp4-vpp3": ParallelConfig(pipeline=4, virtual_pipeline=3)}
MICRO_BATCHES = (1, 3, 4, 8, 64)


def case(name: str) -> MidTrainConfig:
    """The stage of a case."""
    model, layout, dtype = CASES[name]
    config = stage(Path("nowhere"), name)
    return replace(
        config,
        model=MODELS[model],
        parallel=FOOTPRINT_LAYOUTS[layout],
        precision=PrecisionConfig(dtype=dtype),
        data=replace(config.data, seq_length=SEQ_LENGTH),
        budget=replace(config.budget, train_tokens=config.budget.batch_sequences * SEQ_LENGTH),
    )


def main(folder: str) -> None:
    """Measure every case. Both ranks call it."""
    import torch.distributed as dist

    from megatron_octo.platform import resolve
    from megatron_octo.platform.process_group import model_parallel

    console.configure()
    platform = resolve()
    platform.activate()
    dist.init_process_group("gloo")
    rows: dict[str, Any] = {
        "in_flight": {
            f"{name} {micro_batches}": [in_flight(parallel, stage, micro_batches) for stage in range(4)]
            for name, parallel in PIPELINES.items()
            for micro_batches in MICRO_BATCHES
        }
    }
    for name in CASES:
        with model_parallel(platform, case(name).parallel):
            rows[name] = measure(case(name), platform)
    rundir.write_json(Path(folder) / f"{os.environ['RANK']}.json", rows)
    dist.destroy_process_group()


def measure(config: MidTrainConfig, platform: Any) -> dict[str, Any]:
    """What this rank holds, in bytes, but for the parameters, which are counted."""
    from megatron.core import parallel_state as groups

    from megatron_octo.train.distributed import build_chunks, wrap_chunks
    from megatron_octo.train.optimizer import build_optimizer

    chunks = build_chunks(config, platform, num_ids=config.model.vocab_size)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    row = {
        "stage": groups.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
    }
    if config.parallel.pipeline == 1:
        row["kept"] = kept_bytes(chunks[0], config)
        chunks[0].config.recompute_granularity, chunks[0].config.recompute_method = "full", "uniform"
        chunks[0].config.recompute_num_layers = 1
        row["kept_recomputed"] = kept_bytes(chunks[0], config)
    wrapped = wrap_chunks(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.step()  # makes the moments
    row["gradients"] = sum(nbytes(buffer.grad_data) for chunk in wrapped for buffer in chunk.buffers)
    row["optimizer"] = sum(optimizer_bytes(each, config) for each in optimizer.chained_optimizers)
    return row


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Forward passes of a chunk before the first backward pass in megatron's schedule: its warm-up's, and one."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    virtual, size = parallel.virtual_pipeline, parallel.pipeline
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: size, rank=lambda: stage), virtual_pipeline_model_parallel_size=virtual
    )
    total, _, ahead, _ = get_pp_rank_microbatches(micro_batches, virtual or 1, size, p2p_communicator=communicator)
    return int(min(ahead + 1, total))


def optimizer_bytes(optimizer: Any, config: MidTrainConfig) -> int:
    """An optimizer's moments, and its fp32 copies where the weights are not fp32."""
    inner = optimizer.optimizer
    moments = [each for state in inner.state.values() for each in state.values() if getattr(each, "ndim", 0)]
    copies = [p for group in inner.param_groups for p in group["params"]] if config.precision.dtype == "bf16" else []
    return sum(map(nbytes, (*moments, *copies)))


def kept_bytes(chunk: Any, config: MidTrainConfig) -> int:
    """What a forward pass keeps of a micro-batch for the backward pass, weights aside; shared storage counts once."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = config.budget.micro_batch_sequences
    tokens = torch.zeros((rows, SEQ_LENGTH), dtype=torch.int64)
    positions = torch.arange(SEQ_LENGTH).expand(rows, SEQ_LENGTH)
    chunk.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(tokens, positions, None, labels=tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def nbytes(tensor: Any) -> int:
    """A tensor's bytes."""
    return int(tensor.numel() * tensor.element_size())
