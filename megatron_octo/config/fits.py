"""What of a stage's precision, parallel and compute settings does not go together: found before anything starts.

What depends on the machine is `model/build.py:check_platform`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_octo.config.base import require

if TYPE_CHECKING:
    from megatron_octo.config.train import MidTrainConfig

# A side of every FP8 matrix divides by this: Transformer Engine's kernels and, blockwise and mxfp8, the blocks' length.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def check_fit(config: MidTrainConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        SettingsError: with the two settings, their values and what to change.
    """
    _check_fsdp(config)
    _check_context(config)
    _check_sequence(config)
    _check_cuda_graphs(config)
    if config.precision.fp8 != "off":
        _check_bf16_layers(config)
        _check_fp8_weights(config)
        if not config.precision.fp8_emulation:  # which pads
            _check_fp8_shapes(config)


def _check_fsdp(config: MidTrainConfig) -> None:
    parallel = config.parallel
    if not parallel.fsdp:
        return
    for conflict, why, fix in (
        (
            parallel.distributed_optimizer,
            "parallel.distributed_optimizer: FSDP shares out the optimizer's state itself",
            "turn parallel.distributed_optimizer off",
        ),
        (
            parallel.overlap_grad_reduce,
            "parallel.overlap_grad_reduce: FSDP reduces while it computes, always",
            "turn parallel.overlap_grad_reduce off",
        ),
        (
            parallel.pipeline > 1,
            f"parallel.pipeline {parallel.pipeline}: a stage would gather its weights anew for every micro-batch",
            "set parallel.pipeline to 1, or turn parallel.fsdp off",
        ),
    ):
        require(not conflict, f"parallel.fsdp with {why}", fix=fix)


def check_shards(config: MidTrainConfig, num_shards: int) -> None:
    """Refuse FSDP over `num_shards` ranks that do not get equal rows of every weight: megatron's saves need that.

    Raises:
        SettingsError: with the weight and its rows.
    """
    model, tensor = config.model, config.parallel.tensor
    heads = model.num_heads + 2 * model.num_kv_heads
    rows = {
        "model.hidden_size": model.hidden_size,
        "model.vocab_size over parallel.tensor": model.vocab_size // tensor,
        "rows of queries, keys and values over parallel.tensor": heads * model.head_dim // tensor,
        "2 x model.ffn_size over parallel.tensor": 2 * model.ffn_size // tensor,
        **({"model.head_dim": model.head_dim} if model.qk_norm else {}),
    }
    for name, number in rows.items():
        require(
            number % num_shards == 0,
            f"parallel.fsdp over {num_shards} ranks: {name}, {number:,}, does not divide by them",
            fix="change the number of ranks, or turn parallel.fsdp off",
        )


def _check_context(config: MidTrainConfig) -> None:
    context, length = config.parallel.context, config.data.seq_length
    require(
        context == 1 or length % (2 * context) == 0,
        f"data.seq_length {length} with parallel.context {context}: each rank takes two of {2 * context} equal parts "
        "of a sequence",
        fix="choose a length that divides, or another parallel.context",
    )


def _check_sequence(config: MidTrainConfig) -> None:
    parallel, length = config.parallel, config.data.seq_length
    require(
        not parallel.sequence or length // parallel.context % parallel.tensor == 0,
        f"data.seq_length {length} with parallel.sequence, tensor {parallel.tensor} and context {parallel.context}: "
        "each rank takes an equal part of a sequence between the matrices",
        fix="choose a length that divides, or turn parallel.sequence off",
    )


def _check_cuda_graphs(config: MidTrainConfig) -> None:
    if not config.compute.cuda_graphs:
        return
    for conflict, why, fix in (
        (
            config.compute.recompute != "none",
            f"compute.recompute {config.compute.recompute}: a recorded layer cannot be computed again in parts",
            "set compute.recompute to none",
        ),
        (
            not config.data.across_documents,
            "data.across_documents off: the number of documents, a shape, changes from batch to batch",
            "leave data.across_documents on",
        ),
        (
            config.parallel.fsdp,
            "parallel.fsdp: weights would have no fixed address",
            "turn parallel.fsdp off",
        ),
        (
            config.precision.fp8 != "off" and config.precision.fp8_emulation,
            "precision.fp8_emulation, which is not for speed",
            "turn precision.fp8_emulation off",
        ),
    ):
        require(not conflict, f"compute.cuda_graphs with {why}", fix=f"{fix}, or turn compute.cuda_graphs off")


def _check_bf16_layers(config: MidTrainConfig) -> None:
    precision, layers = config.precision, config.model.num_layers
    first, last = precision.bf16_first_layers, precision.bf16_last_layers
    require(
        precision.fp8 != "delayed" or first == last == 0,
        f"precision.bf16_first_layers {first} and bf16_last_layers {last} with precision.fp8 delayed, whose scales "
        "are kept for all layers together",
        fix="choose tensorwise, blockwise or mxfp8, or set both to 0",
    )
    per_rank = layers // config.parallel.pipeline
    require(
        first + last <= layers and max(first, last) <= per_rank,
        f"precision.bf16_first_layers {first} and bf16_last_layers {last} of {layers} layers, {per_rank} a pipeline "
        "rank",
        fix="leave no more in bf16 than the first and the last pipeline rank hold",
    )


def _check_fp8_weights(config: MidTrainConfig) -> None:
    precision, parallel = config.precision, config.parallel
    if not precision.fp8_weights:
        return
    for conflict, why in (
        (precision.fp8_emulation, "precision.fp8_emulation, which rounds bf16 weights at each use"),
        (not parallel.distributed_optimizer, "parallel.distributed_optimizer off, which keeps their fp32 copies"),
        (
            precision.fp8 == "mxfp8" and parallel.overlap_param_gather,
            "precision.fp8 mxfp8 and parallel.overlap_param_gather, which would share a buffer with the gradients",
        ),
    ):
        require(not conflict, f"precision.fp8_weights with {why}", fix="turn one of the two off")


def _check_fp8_shapes(config: MidTrainConfig) -> None:
    model, tensor, recipe = config.model, config.parallel.tensor, config.precision.fp8
    multiple = FP8_MULTIPLES[recipe]
    sides = {
        "model.hidden_size": model.hidden_size,
        "queries of a rank (model.num_heads x head_dim / parallel.tensor)": model.num_heads * model.head_dim // tensor,
        "queries, keys and values of a rank": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // tensor,
        "model.ffn_size / parallel.tensor": model.ffn_size // tensor,
        "tokens of a rank's micro-batch (budget.micro_batch_sequences x data.seq_length / parallel.context)": (
            config.budget.micro_batch_sequences * config.data.seq_length // config.parallel.context
        ),
    }
    for name, size in sides.items():
        require(
            size % multiple == 0,
            f"precision.fp8 {recipe} multiplies in blocks of {multiple}, and {name}, {size:,}, does not divide by it",
            fix="choose another recipe (precision.fp8), another parallel.tensor, or bf16 (precision.fp8 off)",
        )
