"""A small model that tests of conversion share: its shape, and the weights of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_octo.config.model import ModelConfig

if TYPE_CHECKING:
    import torch

MODEL = ModelConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=24,
    vocab_size=32,
    tied_embeddings=False,
    max_positions=64,
)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
