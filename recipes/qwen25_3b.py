"""Qwen2.5-3B, stable-then-decay: 209.7B tokens, then three branches of 21.0B.

Rate 2e-5: ours, that of the Llama of this size; the paper trains Qwen2.5 by RL alone, to compare Llama with. The rest
as recipes/octothinker.py says. Shape: the base's config.json.

Hardware: as Llama-3.2-3B's; 61 GiB of 80 GB (docs/training.md).
Time: not yet measured; 0.94 times the FLOP of Llama-3.2-3B a token, whose file says what to expect.
Loss: not yet measured.

The corpora need Qwen2.5's tokenizer. For each source of the mixture:
  octo data prepare recipes/corpora.py:wildchat --tokenizer runs/tokenizers/qwen2.5 --output runs/data-qwen2.5/wildchat
"""

from llama32_3b import LAYOUTS
from octothinker import QWEN, decay, stable

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import MidTrainConfig

MODEL = ModelConfig(
    hidden_size=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=2,
    ffn_size=11_008,
    vocab_size=151_936,
    tied_embeddings=True,
    qkv_bias=True,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    max_positions=32_768,
)


def stable_200b() -> MidTrainConfig:
    """The stable stage: 209.7B tokens at a constant rate, mostly refined math web."""
    return stable("qwen25-3b", MODEL, peak=2e-5, layout=LAYOUTS["h100"], **QWEN)


def decay_short() -> MidTrainConfig:
    """The branch of short chains of thought: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "short")


def decay_long() -> MidTrainConfig:
    """The branch of long chains of thought, with <think>: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "long")


def decay_hybrid() -> MidTrainConfig:
    """The branch of both: 21.0B tokens, cosine to a tenth of the rate."""
    return decay(stable_200b(), "hybrid")
