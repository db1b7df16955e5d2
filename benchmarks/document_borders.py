"""What it costs to cut attention at documents: forward and backward of a small model on one sequence; prints JSON.

    OMP_NUM_THREADS=1 python benchmarks/document_borders.py

Four ways over the same tokens and weights, in turn, in one process: attention across documents; cut as training does
it (PackedSeqParams); cut by a dense mask [s, s] in torch's attention; cut by the same mask in megatron's own unfused
attention. Medians of CPU seconds of this process. The three that cut must agree in their loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import ParallelConfig, PrecisionConfig
from megatron_octo.data.borders import cut_at_documents
from megatron_octo.model.build import build_model
from megatron_octo.platform import resolve
from megatron_octo.platform.process_group import model_parallel
from megatron_octo.train.step import packed_sequences

SEQ_LENGTH = 2048
EOS = 2
MODEL = ModelConfig(
    hidden_size=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    ffn_size=768,
    vocab_size=512,
    tied_embeddings=True,
    max_positions=SEQ_LENGTH,
)
PACKAGES = ("torch", "megatron-core")
AGREEMENT = 1e-4
Way = Callable[[], Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[4, 16, 64], help="documents in the sequence")
    parser.add_argument("--rounds", type=int, default=7, help="times that each way is measured")
    asked = parser.parse_args()
    platform = resolve()
    with model_parallel(platform, ParallelConfig()):
        model = build_model(
            MODEL, platform=platform, parallel=ParallelConfig(), precision=PrecisionConfig(dtype="fp32")
        )
        result = {
            "hardware": {"cores": os.cpu_count(), "processor": machine.processor() or machine.machine()},
            "platform": platform.describe(),
            "threads": _threads(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "seq_length": SEQ_LENGTH,
            "parameters": MODEL.num_parameters,
            "sequences": [_measure(model, number, asked.rounds) for number in asked.documents],
        }
    json.dump(result, sys.stdout, indent=2)


def _measure(model: Any, num_documents: int, rounds: int) -> dict[str, Any]:
    ways = _ways(model, _sequence(num_documents))
    losses = {name: float(way()) for name, way in ways.items()}  # and warm up
    cut = [loss for name, loss in losses.items() if name != "across_documents"]
    assert max(cut) - min(cut) < AGREEMENT, losses
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way().backward()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "documents": num_documents,
        "median_cpu_seconds": {name: round(each, 4) for name, each in medians.items()},
        "times_faster_than": {name: round(each / medians["cut"], 2) for name, each in medians.items() if name != "cut"},
        "losses": losses,
    }


def _ways(model: Any, tokens: Any) -> dict[str, Way]:
    """Each computes the mean loss of the same tokens."""
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    labels = tokens.roll(-1)
    hidden, _, _ = _get_ltor_masks_and_position_ids(tokens, EOS, True, True, False, True)
    batch = cut_at_documents({"tokens": tokens[None], "labels": labels[None]}, EOS)
    packing = packed_sequences(batch)
    ordinary = torch.arange(SEQ_LENGTH)[None]

    def dense(kind: type) -> Way:
        def loss() -> Any:
            kept = [layer.self_attention.core_attention for layer in model.decoder.layers]
            for number, layer in enumerate(model.decoder.layers, start=1):
                layer.self_attention.core_attention = kind(model.config, number)
            try:
                return model(tokens[None], ordinary, hidden[None], labels=labels[None]).mean()
            finally:
                for layer, each in zip(model.decoder.layers, kept, strict=True):
                    layer.self_attention.core_attention = each

        return loss

    return {
        "across_documents": lambda: model(tokens[None], ordinary, None, labels=labels[None]).mean(),
        "cut": lambda: model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packing
        ).mean(),
        "dense_mask": dense(_masked_attention_class()),
        "megatron_dense_mask": dense(_megatrons_attention_class()),
    }


def _sequence(num_documents: int) -> Any:
    """Random tokens in documents of random lengths, the same at each call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, MODEL.vocab_size, (SEQ_LENGTH,), generator=generator)
    tokens[torch.randperm(SEQ_LENGTH - 1, generator=generator)[: num_documents - 1]] = EOS
    return tokens


def _masked_attention_class() -> type:
    import torch

    class MaskedAttention(torch.nn.Module):
        """torch's attention under a dense mask."""

        def __init__(self, config: Any, layer_number: int) -> None:
            super().__init__()

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
            s, b, n, d = query.shape
            out = torch.nn.functional.scaled_dot_product_attention(
                *(each.permute(1, 2, 0, 3) for each in (query, key, value)),
                attn_mask=~attention_mask,
                enable_gqa=n != key.shape[2],
            )
            return out.permute(2, 0, 1, 3).reshape(s, b, n * d)

    return MaskedAttention


def _megatrons_attention_class() -> type:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    class MegatronsAttention(DotProductAttention):
        """megatron's unfused attention, told that the mask is not merely causal."""

        def __init__(self, config: Any, layer_number: int) -> None:
            super().__init__(config, layer_number, AttnMaskType.padding, "self")

        def forward(self, *args: Any, attn_mask_type: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, attn_mask_type=AttnMaskType.padding, **kwargs)

    return MegatronsAttention


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


if __name__ == "__main__":
    main()
