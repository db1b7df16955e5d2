"""Llama-3.1-8B, stable-then-decay: 209.7B tokens, then three branches of 21.0B.

Rate 1e-5 (stated); that the 8B base is Llama-3.1's is inferred: there is no Llama-3.2-8B. The rest as
recipes/octothinker.py says. Shape: the base's config.json.

Hardware: 8, 64 or 256 GPUs; tensor parallelism 2 with sequence parallelism, FP8, 64 GiB of 80 GB (docs/training.md).
Time: not yet measured. At 14,451 tokens/s a GPU the stable stage takes 4,031 GPU-hours (63 h on 64), a branch 403
(6 h): NVIDIA's figure for Llama-3 8B on 8 H100 in FP8 with FSDP instead of tensor parallelism, which we have not run.
On B200 it is 29,521 in MXFP8, with the layout used here: half the hours.
Loss: not yet measured.
"""

from dataclasses import replace

from octothinker import MXFP8, TENSORWISE, decay, stable

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import Layout, MidTrainConfig, ParallelConfig

MODEL = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=14_336,
    vocab_size=128_256,
    tied_embeddings=False,
    rope_factor=8.0,
    max_positions=131_072,
)
DATA_PARALLEL = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
# Weights and fp32 gradients alone are 45 GiB. On 80 GB two ranks share them, which is cheaper than to compute
# activations again; 141 GB hold them whole.
LAYOUTS = {
    "h100": Layout(parallel=replace(DATA_PARALLEL, tensor=2, sequence=True), precision=TENSORWISE),
    "h200": Layout(parallel=DATA_PARALLEL, precision=TENSORWISE),
    "b200": Layout(parallel=DATA_PARALLEL, precision=MXFP8, micro_batch_sequences=2),
}


def stable_200b() -> MidTrainConfig:
    """The stable stage: 209.7B tokens at a constant rate, mostly refined math web."""
    return stable("llama31-8b", MODEL, peak=1e-5, layout=LAYOUTS["h100"])


def decay_short() -> MidTrainConfig:
    """The branch of short chains of thought: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "short")


def decay_long() -> MidTrainConfig:
    """The branch of long chains of thought, with <think>: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "long")


def decay_hybrid() -> MidTrainConfig:
    """The branch of both: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "hybrid")
