"""Llama-3.2-1B, stable-then-decay: 209.7B tokens, then three branches of 21.0B.

Rate 5e-5 (stated); the rest as recipes/octothinker.py says. Shape: the base's config.json.

Hardware: 8, 64 or 256 GPUs; data parallelism alone, BF16, 45 GiB of 80 GB (docs/training.md).
Time: not yet measured. At 29,157 tokens/s a GPU the stable stage takes 1,998 GPU-hours (31 h on 64), a branch 200
(3 h): a proxy, published for MPT-1B in BF16 on 8 H100 at this length of sequence; for Llama-3.2-1B none was found.
Loss: not yet measured.

BF16 everywhere: for the same proxy FP8 gave 1.10 times the speed.
"""

from octothinker import decay, stable

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import Layout, MidTrainConfig, ParallelConfig

MODEL = ModelConfig(
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=8192,
    vocab_size=128_256,
    tied_embeddings=True,
    rope_factor=32.0,
    max_positions=131_072,
)
BF16 = Layout(
    parallel=ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
    micro_batch_sequences=2,  # a step on 256 GPUs is one forward pass of 2
)
LAYOUTS = {"h100": BF16, "h200": BF16, "b200": BF16}


def stable_200b() -> MidTrainConfig:
    """The stable stage: 209.7B tokens at a constant rate, mostly refined math web."""
    return stable("llama32-1b", MODEL, peak=5e-5, layout=LAYOUTS["h100"])


def decay_short() -> MidTrainConfig:
    """The branch of short chains of thought: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "short")


def decay_long() -> MidTrainConfig:
    """The branch of long chains of thought, with <think>: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "long")


def decay_hybrid() -> MidTrainConfig:
    """The branch of both: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "hybrid")
