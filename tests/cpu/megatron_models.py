"""Megatron models for tests of conversion, at any layout: filled from an import, asked for tokens, saved plainly.

Every function is called by all ranks, inside of `model_parallel`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import ParallelConfig, PrecisionConfig
from megatron_octo.platform import Platform

STEP = 3


def loaded(model: ModelConfig, imported: Path, *, platform: Platform, parallel: ParallelConfig) -> list[Any]:
    """This rank's chunks of the model in fp32, with the weights of the import."""
    from megatron.core import parallel_state as groups

    from megatron_octo.model.build import build_model
    from megatron_octo.model.weights import load_weights

    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    chunks = [
        build_model(
            model,
            platform=platform,
            parallel=parallel,
            precision=PrecisionConfig(dtype="fp32"),
            pre_process=groups.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=groups.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in stages
    ]
    load_weights(chunks, imported)
    return chunks


def save_plain(chunks: Sequence[Any], run: Path) -> None:
    """Save as Megatron-LM does: iter_0000003 in the folder `run`, settings pickled, and the name of the last."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_octo.model.weights import sharded_weights

    folder = run / f"iter_{STEP:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"args": argparse.Namespace(hidden_size=64), "iteration": STEP, "checkpoint_version": 3.0}
    dist_checkpointing.save(settings | sharded_weights(chunks), str(folder))
    if dist.get_rank() == 0:
        (run / "latest_checkpointed_iteration.txt").write_text(str(STEP))
    dist.barrier()


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens most likely after `prompt`, a forward pass each; of a model that is not interleaved."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as groups
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    ids = list(prompt)
    for _ in range(num_tokens):
        if not model.pre_process:
            hidden = torch.empty(len(ids), 1, model.config.hidden_size)  # [s, b, h]
            dist.recv(hidden, groups.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        with torch.no_grad():
            out = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        chosen = torch.zeros(1, dtype=torch.long)
        if model.post_process:
            chosen[0] = gather_from_tensor_model_parallel_region(out)[0, -1].argmax()
        else:
            dist.send(out, groups.get_pipeline_model_parallel_next_rank())
        dist.broadcast(
            chosen, groups.get_pipeline_model_parallel_last_rank(), groups.get_pipeline_model_parallel_group()
        )
        ids.append(int(chosen))
    return ids[len(prompt) :]
