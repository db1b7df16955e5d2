"""Arithmetic that training costs, and what a GPU can do at best: the two numbers behind `mfu`."""

from __future__ import annotations

from megatron_octo.config.model import ModelConfig

# Dense bf16 FLOP/s, from NVIDIA's data sheets, which state twice as much: with sparsity. The first that a name holds.
PEAK_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def train_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOP for one token of a sequence of `seq_length`.

    6 for each weight of a matrix that the token meets (the embedding look-up is none, the output layer is
    one), and causal attention at half of the full square.
    """
    h, d = config.hidden_size, config.head_dim
    layer = h * d * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * h * config.ffn_size
    matrices = config.num_layers * layer + config.vocab_size * h
    attention = config.num_layers * 2 * config.num_heads * d * seq_length / 2
    return 6 * (matrices + attention)


def peak_flops(gpu_name: str) -> float | None:
    """The best bf16 FLOP/s of a GPU by its name, None if it is not known."""
    return next((peak for name, peak in PEAK_BF16.items() if name in gpu_name), None)
