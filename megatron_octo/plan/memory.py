"""A GPU's memory on paper: what a rank of a training stage holds at its peak, by arithmetic. Runs nothing.

Activations follow Korthikanti et al. 2022 (arXiv 2205.05198), section 4: what each operation keeps for the backward
pass, shared out by tensor and sequence parallelism, times the micro-batches that a pipeline rank has in flight. Their
sums are for GELU, LayerNorm, dropout and whole attention squares; these are for RMSNorm, SwiGLU, grouped queries and
attention that keeps no square (flash attention), without dropout.

Not in it: offloading, CUDA graphs' own buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_octo.config.base import Settings
from megatron_octo.config.train import MidTrainConfig, TrainPlan

GIB = 2**30

GPU_GIB = {"h100": 79, "h200": 139, "b200": 178}
"""What torch finds on a GPU sold as 80, 141 and 180 GB."""

RESERVE_BYTES = 6 * GIB
"""CUDA's context, NCCL's buffers, the workspaces of cuBLAS and Transformer Engine, the temporary tensors of one layer,
and what the allocator cannot use. An allowance, not measured."""

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
FP8_BYTES = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Part(Settings):
    """One line of the sum."""

    name: str
    """What is held."""
    bytes: int
    """How much of it."""
    arithmetic: str
    """How that comes about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory(Settings):
    """What a rank of one pipeline stage holds at its peak."""

    stage: int
    """The pipeline stage."""
    parts: tuple[Part, ...]
    """What it consists of."""

    @property
    def total_gib(self) -> float:
        """All of it."""
        return sum(part.bytes for part in self.parts) / GIB

    def arithmetic(self) -> str:
        """The sum, a line a part."""
        lines = [f"memory  {self.total_gib:.1f} GiB a GPU at the peak, estimated (pipeline stage {self.stage}):"]
        lines += [f"        {part.bytes / GIB:6.1f}  {part.name}: {part.arithmetic}" for part in self.parts]
        return "\n".join(lines)


def rank_memory(config: MidTrainConfig, plan: TrainPlan) -> RankMemory:
    """What a rank of the fullest pipeline stage holds."""
    stages = (stage_memory(config, plan, stage) for stage in range(config.parallel.pipeline))
    return max(stages, key=lambda memory: memory.total_gib)


def stage_memory(config: MidTrainConfig, plan: TrainPlan, stage: int) -> RankMemory:
    """What a rank of pipeline stage `stage` holds."""
    parts = (
        *_states(config, plan, stage),
        _activations(config, plan, stage),
        *([_logits(config)] if stage == config.parallel.pipeline - 1 else []),
        Part(name="reserve", bytes=RESERVE_BYTES, arithmetic="an allowance for CUDA, NCCL, workspaces, fragmentation"),
    )
    return RankMemory(stage=stage, parts=parts)


def stage_parameters(config: MidTrainConfig, stage: int) -> int:
    """Parameters that a rank of pipeline stage `stage` holds."""
    model, tensor = config.model, config.parallel.tensor
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    tables = first + last - (first and last and model.tied_embeddings)  # tied and far apart: each end has its own
    outside = tables * model.vocab_size * model.hidden_size // tensor + last * model.hidden_size
    return len(_layers(config, stage)) * (_matrices(config) + _vectors(config)) + outside


def layer_bytes(config: MidTrainConfig, *, fp8: bool, recompute: str = "none") -> int:
    """Bytes that one layer keeps of each token of a rank's micro-batch for the backward pass."""
    model, parallel = config.model, config.parallel
    h, f, heads = model.hidden_size, model.ffn_size, model.head_dim * model.num_heads
    qkv = model.head_dim * (model.num_heads + 2 * model.num_kv_heads)
    dtype = DTYPE_BYTES[config.precision.dtype]
    operand = FP8_BYTES if fp8 else dtype  # what a matrix product keeps of its input
    if recompute == "full":
        norms, attention, mlp = h * dtype, 0, 0  # the layer's input alone
    else:
        norms = 2 * h * dtype + 2 * h * operand  # both norms' inputs, and their results, inputs of products
        attention = (qkv + heads) * dtype + 4 * model.num_heads  # queries, keys, values, result; fp32 statistics
        attention += heads * operand if fp8 else 0  # else the product keeps the result itself
        attention += (qkv - model.head_dim * model.num_kv_heads) * dtype if model.qk_norm else 0  # the norms' inputs
        mlp = 2 * f * dtype  # gate and up
        mlp += 0 if recompute == "selective" and not fp8 else f * operand  # silu(gate) x up
    return norms // (parallel.tensor if parallel.sequence else 1) + (attention + mlp) // parallel.tensor


def chunks_in_flight(config: MidTrainConfig, plan: TrainPlan, stage: int) -> int:
    """Forward passes of a model chunk that a rank of pipeline stage `stage` has not gone back through, at the most.

    With one chunk a rank, it runs ahead by the stages behind it; interleaved, by two a stage behind it, and by a round
    of micro-batches through each of its other chunks.
    """
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    behind = pipeline - 1 - stage
    ahead = behind if virtual == 1 else 2 * behind + (virtual - 1) * pipeline
    return min(ahead + 1, plan.num_micro_batches * virtual)


def _states(config: MidTrainConfig, plan: TrainPlan, stage: int) -> list[Part]:
    """Weights, gradients and the optimizer's state."""
    precision, parallel = config.precision, config.parallel
    total, dtype = stage_parameters(config, stage), DTYPE_BYTES[precision.dtype]
    in_fp8 = _matrices(config) * sum(_is_fp8(config, layer) for layer in _layers(config, stage))
    whole = total - in_fp8 if precision.fp8_weights else total
    ranks = plan.data_ranks * parallel.context
    shards = ranks if parallel.distributed_optimizer or parallel.fsdp else 1
    state = 12 if precision.dtype == "bf16" else 8  # two moments, and an fp32 copy of weights that are not fp32
    if parallel.fsdp:  # what is in no layer is gathered all the time, and two layers: one that computes, the next
        layer = _matrices(config) + _vectors(config)
        gathered = total - (len(_layers(config, stage)) - 2) * layer
        text = f"{total:,} parameters x {{0}} bytes / {shards} ranks"
        sums = [
            ("weights", -(-total * dtype // shards), text.format(dtype)),
            ("gathered", 2 * gathered * dtype, f"{gathered:,} parameters x {dtype} bytes, and their gradients"),
            ("gradients", -(-total * dtype // shards), text.format(dtype)),
            ("optimizer", -(-total * state // shards), text.format(state)),
        ]
        return [Part(name=name, bytes=size, arithmetic=arithmetic) for name, size, arithmetic in sums]
    sums = [
        ("weights", whole * dtype, f"{whole:,} parameters x {dtype} bytes"),
        ("FP8 weights", in_fp8 * 2 * FP8_BYTES, f"{in_fp8:,} parameters x 2 bytes, by rows and by columns"),
        ("gradients", total * 4, f"{total:,} parameters x 4 bytes"),
        ("optimizer", -(-total * state // shards), f"{total:,} parameters x {state} bytes / {shards} ranks"),
    ]
    return [Part(name=name, bytes=size, arithmetic=text) for name, size, text in sums if size]


def _activations(config: MidTrainConfig, plan: TrainPlan, stage: int) -> Part:
    recompute, tokens, layers = config.compute.recompute, _tokens(config), _layers(config, stage)
    kept = [layer_bytes(config, fp8=_is_fp8(config, layer), recompute=recompute) for layer in layers]
    again = max(layer_bytes(config, fp8=_is_fp8(config, layer)) for layer in layers) - max(kept)
    flying, chunks = chunks_in_flight(config, plan, stage), config.parallel.virtual_pipeline or 1
    text = f"{len(layers)} layers x {tokens:,} tokens x {sum(kept) / len(layers):,.0f} bytes"
    text += f" x {flying / chunks:g} micro-batches in flight" if flying != chunks else ""
    text += f" + {tokens:,} tokens x {again:,} bytes of the layer computed again" if again else ""
    return Part(name="activations", bytes=tokens * (sum(kept) * flying // chunks + again), arithmetic=text)


def _logits(config: MidTrainConfig) -> Part:
    """The last stage's logits, their fp32 copy, which becomes probabilities and gradient in place, and the last norm's
    input and result."""
    model, parallel, tokens = config.model, config.parallel, _tokens(config)
    dtype = DTYPE_BYTES[config.precision.dtype]
    ids, each = model.vocab_size // parallel.tensor, 4 + (dtype if dtype < 4 else 0)
    norm = 2 * model.hidden_size * dtype // (parallel.tensor if parallel.sequence else 1)
    text = f"{tokens:,} tokens x ({ids:,} ids x {each} bytes + {norm:,} bytes of the last norm)"
    return Part(name="logits", bytes=tokens * (ids * each + norm), arithmetic=text)


def _tokens(config: MidTrainConfig) -> int:
    """Tokens of a micro-batch on one rank."""
    return config.budget.micro_batch_sequences * config.data.seq_length // config.parallel.context


def _layers(config: MidTrainConfig, stage: int) -> list[int]:
    """The layers of a pipeline stage: `virtual_pipeline` chunks, a round of all stages apart."""
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    size = config.model.num_layers // (pipeline * virtual)
    starts = [(round_ * pipeline + stage) * size for round_ in range(virtual)]
    return [start + i for start in starts for i in range(size)]


def _is_fp8(config: MidTrainConfig, layer: int) -> bool:
    precision = config.precision
    last = config.model.num_layers - precision.bf16_last_layers
    return precision.fp8 != "off" and precision.bf16_first_layers <= layer < last


def _matrices(config: MidTrainConfig) -> int:
    """Weights of a layer's matrices on one rank: those that FP8 multiplies."""
    model = config.model
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    return (attention + 3 * model.hidden_size * model.ffn_size) // config.parallel.tensor


def _vectors(config: MidTrainConfig) -> int:
    """A layer's norms, and its biases on one rank."""
    model = config.model
    biases = model.head_dim * (model.num_heads + 2 * model.num_kv_heads) if model.qkv_bias else 0
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    return norms + biases // config.parallel.tensor
