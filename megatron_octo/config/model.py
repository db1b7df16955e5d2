"""The shape of a model: Llama, Qwen2.5 or Qwen3.

Names are this project's; `model/mapping.py` has the other two vocabularies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_octo.config.base import Settings, require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Settings):
    """Architecture of a decoder-only model with RMSNorm, SwiGLU, rotary positions and grouped queries."""

    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads (query groups); divides num_heads."""
    ffn_size: int
    """Inner width of the MLP (each of gate and up)."""
    vocab_size: int
    """Rows of the embedding, padding included; a tokenizer may have fewer ids, never more."""
    tied_embeddings: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias (Qwen2.5), which Llama's have not."""
    qk_norm: bool = False
    """Whether each head's queries and keys pass an RMSNorm before the rotation (Qwen3)."""
    head_dim: int = 0
    """Width of one head; 0 means hidden_size / num_heads."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies."""
    rope_factor: float | None = None
    """Llama-3 rotary scaling (8 for Llama 3.1, 32 for 3.2); None for none."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    max_positions: int = 8192
    """Longest sequence the model promises to handle, tokens."""
    init_std: float = 0.02
    """Standard deviation of random initial weights."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "model.",
            *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "max_positions"),
        )
        require(self.head_dim >= 0, f"model.head_dim {self.head_dim} is below 0", fix="give a width, or 0")
        for name in ("rope_theta", "rope_factor", "norm_eps", "init_std"):
            value = getattr(self, name)
            require(
                (name == "rope_factor" and value is None) or 0 < value < math.inf,
                f"model.{name} {value} is no finite number above 0",
                fix="give the number that the model has",
            )
        if self.head_dim == 0:
            require(
                self.hidden_size % self.num_heads == 0,
                f"model.hidden_size {self.hidden_size} does not divide by model.num_heads {self.num_heads}",
                fix="choose a multiple, or set model.head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads {self.num_heads} does not divide by model.num_kv_heads {self.num_kv_heads}",
            fix="choose num_kv_heads among the divisors of num_heads",
        )

    @property
    def num_parameters(self) -> int:
        """All weights, the embedding counted once if tied."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_heads + 2 * self.num_kv_heads)
        bias = d * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        norms = 2 * h + (2 * d if self.qk_norm else 0)
        layer = attention + bias + 3 * h * self.ffn_size + norms
        embeddings = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + h
