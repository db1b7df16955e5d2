"""Llama-3.2-3B, stable-then-decay: 209.7B tokens, then three branches of 21.0B.

Rate 2e-5 (stated); the rest as recipes/octothinker.py says. Shape: the base's config.json.

Hardware: 8, 64 or 256 GPUs; data parallelism alone, FP8, 56 GiB of 80 GB (docs/training.md).
Time: not yet measured. At 19,146 tokens/s a GPU the stable stage takes 3,043 GPU-hours (48 h on 64), a branch 304
(5 h): a proxy, published for MPT-3B in FP8 on 8 H100 at this length of sequence (BF16: 16,578); for Llama-3.2-3B none
was found.
Loss: not yet measured.
"""

from octothinker import MXFP8, TENSORWISE, decay, stable

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import Layout, MidTrainConfig, ParallelConfig

MODEL = ModelConfig(
    hidden_size=3072,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    ffn_size=8192,
    vocab_size=128_256,
    tied_embeddings=True,
    rope_factor=32.0,
    max_positions=131_072,
)
DATA_PARALLEL = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS = {
    "h100": Layout(parallel=DATA_PARALLEL, precision=TENSORWISE),
    "h200": Layout(parallel=DATA_PARALLEL, precision=TENSORWISE, micro_batch_sequences=2),
    "b200": Layout(parallel=DATA_PARALLEL, precision=MXFP8, micro_batch_sequences=2),
}


def stable_200b() -> MidTrainConfig:
    """The stable stage: 209.7B tokens at a constant rate, mostly refined math web."""
    return stable("llama32-3b", MODEL, peak=2e-5, layout=LAYOUTS["h100"])


def decay_short() -> MidTrainConfig:
    """The branch of short chains of thought: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "short")


def decay_long() -> MidTrainConfig:
    """The branch of long chains of thought, with <think>: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "long")


def decay_hybrid() -> MidTrainConfig:
    """The branch of both: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "hybrid")
