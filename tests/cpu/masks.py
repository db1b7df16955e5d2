"""What two ranks do for `test_masks.py`, in one launch: small stages with attention cut at documents and loss on
answers only, one after another.

Two ranks call `main`. Rank 0 first trains and computes alone, without a group; then both train together, layout after
layout. The metrics are in the run folders, what was computed in checks.json.
Called once more, by four ranks, all train in a pipeline whose middle holds neither embedding nor output layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_octo import console, rundir
from megatron_octo.config.train import BudgetConfig, FromRun, MidTrainConfig, ParallelConfig, PrecisionConfig
from megatron_octo.data.indexed import read_documents
from megatron_octo.data.manifest import read_manifest, write_manifest
from tests.cpu.matrix import LAYOUTS, alone, train
from tests.prepared import EOS, stage, write_data

SEQ_LENGTH = 64
STEPS = 6
BATCH = 8
SPARSE_STEPS = 12
SPARSE_BATCH = 2
CUT_LAYOUTS = ("dp2", "tp2", "tp2-sp", "pp2", "pp2-vpp2")
SPARSE_LAYOUTS = ("dp2", "pp2")
INIT_STD = 0.15  # attention that depends on positions, as a trained model's does


def main(work: str) -> None:
    """Train and compute everything below `work`."""
    folder = Path(work)
    console.configure()
    os.environ["OCTO_RUNS"] = str(folder / "runs")
    if int(os.environ["WORLD_SIZE"]) == 4:
        train(replace(cut(folder, "cut-pp4"), parallel=ParallelConfig(pipeline=4)))
        return
    if int(os.environ["RANK"]) == 0:
        write_data(folder / "data")
        mark_answers(folder / "data" / "a", share=0.6)
        mark_answers(folder / "data" / "b", share=0.3)
        with alone():
            train_alone(folder)
            rundir.write_json(folder / "checks.json", compute(folder))
    train_together(folder)


def train_alone(folder: Path) -> None:
    """The stages of one rank: the references."""
    train(strong(stage(folder / "data", "base", steps=1)))
    train(across(folder, "across"))
    train(cut(folder, "cut"))
    rows = cut(folder, "cut-rows")
    train(replace(rows, budget=replace(rows.budget, micro_batch_sequences=1)))
    train(sparse(folder, "sparse"))


def train_together(folder: Path) -> None:
    """Both ranks: the layouts. Both ranks call it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for name in CUT_LAYOUTS:
        train(replace(cut(folder, f"cut-{name}"), parallel=LAYOUTS[name]))
    for name in SPARSE_LAYOUTS:
        train(replace(sparse(folder, f"sparse-{name}"), parallel=LAYOUTS[name]))
    bf16 = replace(cut(folder, "cut-bf16"), precision=PrecisionConfig(dtype="bf16"))
    train(replace(bf16, parallel=LAYOUTS["tp2-sp"]))
    dist.destroy_process_group()


def mark_answers(folder: Path, *, share: float) -> None:
    """Mark a stretch at the end of a share of a prepared source's documents."""
    rng = np.random.default_rng(5)
    write_marks(
        folder,
        lambda ids: np.arange(len(ids)) >= len(ids) - (rng.integers(1, len(ids)) if rng.random() < share else 0),
    )


def write_marks(folder: Path, mark: Callable[[list[int]], np.ndarray]) -> None:
    """Give a prepared source its marks; `mark` says for a document which tokens are part of an answer."""
    manifest, shards = read_manifest(folder), []
    for shard in manifest.shards:
        marks = [mark(ids) for ids in read_documents(folder / shard.prefix, shard.documents)]
        path = folder / f"{shard.prefix}.loss"
        path.write_bytes(np.concatenate(marks).astype(np.uint8).tobytes())
        shards.append(replace(shard, loss_sha256=rundir.sha256(path)))
    write_manifest(folder, replace(manifest, shards=tuple(shards)))


def strong(config: MidTrainConfig) -> MidTrainConfig:
    """The same with larger weights."""
    return replace(config, model=replace(config.model, init_std=INIT_STD))


def across(folder: Path, name: str) -> MidTrainConfig:
    """A stage with loss on all tokens of source a and on the answers of source b."""
    config = strong(stage(folder / "data", name))
    a, b = config.data.sources
    return replace(
        config,
        start=FromRun(run="base"),
        data=replace(config.data, seq_length=SEQ_LENGTH, sources=(a, replace(b, loss="answers"))),
        budget=BudgetConfig(train_tokens=STEPS * BATCH * SEQ_LENGTH, batch_sequences=BATCH, micro_batch_sequences=2),
    )


def cut(folder: Path, name: str) -> MidTrainConfig:
    """The same, attention cut at documents."""
    config = across(folder, name)
    return replace(config, data=replace(config.data, across_documents=False))


def sparse(folder: Path, name: str) -> MidTrainConfig:
    """A stage of few answers, a sequence a rank: in some steps a rank has nothing to learn from, or none has."""
    config = strong(stage(folder / "data", name))
    source = replace(config.data.sources[1], weight=1.0, loss="answers")
    return replace(
        config,
        start=FromRun(run="base"),
        data=replace(config.data, sources=(source,)),
        budget=BudgetConfig(
            train_tokens=SPARSE_STEPS * SPARSE_BATCH * config.data.seq_length, batch_sequences=SPARSE_BATCH
        ),
    )


def compute(folder: Path) -> dict[str, Any]:
    """What the weights that all stages start from do, document by document, in plain torch."""
    import torch

    from megatron_octo.model.weights import load_weights
    from megatron_octo.platform import resolve
    from megatron_octo.platform.process_group import model_parallel
    from megatron_octo.train.distributed import build_chunks

    config, platform = cut(folder, "x"), resolve()
    with model_parallel(platform, ParallelConfig()):
        model = build_chunks(config, platform, num_ids=config.model.vocab_size)[0]
        load_weights([model], rundir.step_folder(rundir.run_folder("base"), 1))
        rows = sequences(across(folder, "x"), folder / "index")[:BATCH]
        few = sequences(sparse(folder, "x"), folder / "index-sparse")
        with rotated_queries(model) as queries_apart:
            apart = torch.stack([apart_logits(model, row["tokens"]) for row in rows])
        together = torch.cat([logits(model, row["tokens"]) for row in rows])
        with rotated_queries(model) as queries_packed:
            packed = packed_logits(model, rows)
        return {
            "documents": [len(documents(row["tokens"])) for row in rows],
            "packed_from_apart": largest(packed - apart),
            "across_from_apart": largest(together - apart),
            "queries_from_apart": largest(torch.cat(queries_packed) - torch.cat(queries_apart)),
            "cut": loss_and_gradient(model, apart, rows),
            "across": loss_and_gradient(model, together, rows),
            "counts": [int(row["loss_mask"].sum()) for row in rows],
            "sparse_counts": [int(row["loss_mask"].sum()) for row in few],
        }


def sequences(config: MidTrainConfig, cache: Path) -> list[dict[str, Any]]:
    """A stage's sequences, in order."""
    from megatron_octo.data.loader import build_dataset
    from megatron_octo.data.mixture import read_mixture

    dataset = build_dataset(
        read_mixture(config.data, model_vocab_size=config.model.vocab_size),
        num_sequences=config.num_steps * config.budget.batch_sequences,
        seq_length=config.data.seq_length,
        seed=config.data.shuffle_seed,
        cache=cache,
        reads_data=True,
    )
    assert dataset is not None
    return [dataset[number] for number in range(config.num_steps * config.budget.batch_sequences)]


def documents(tokens: Any) -> list[Any]:
    """The parts of a sequence that end with the end-of-text id, and the rest."""
    ends = [index + 1 for index, token in enumerate(tokens.tolist()) if token == EOS and index + 1 < len(tokens)]
    return [tokens[start:end] for start, end in zip([0, *ends], [*ends, len(tokens)], strict=True)]


def logits(model: Any, tokens: Any) -> Any:
    """[1, s, v] of one sequence, by itself."""
    import torch

    return model(tokens[None], torch.arange(len(tokens))[None], None)


def apart_logits(model: Any, tokens: Any) -> Any:
    """[s, v]: each document of a sequence by itself."""
    import torch

    return torch.cat([logits(model, each)[0] for each in documents(tokens)])


@contextmanager
def rotated_queries(model: Any) -> Iterator[list[Any]]:
    """Collect the queries [tokens, heads, d] that reach the first layer's attention, rotated by their positions."""
    queries: list[Any] = []
    attention = model.decoder.layers[0].self_attention.core_attention
    hook = attention.register_forward_pre_hook(
        lambda _, given: queries.append(given[0].flatten(0, -3)), with_kwargs=False
    )
    try:
        yield queries
    finally:
        hook.remove()


def packed_logits(model: Any, rows: list[dict[str, Any]]) -> Any:
    """[b, s, v]: all sequences in one micro-batch, as training does it."""
    import torch

    from megatron_octo.data.borders import cut_at_documents
    from megatron_octo.train.step import packed_sequences

    batch = cut_at_documents({"tokens": torch.stack([row["tokens"] for row in rows])}, EOS)
    out = model(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed_sequences(batch))
    return out.reshape(len(rows), SEQ_LENGTH, -1)


def loss_and_gradient(model: Any, predicted: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The mean loss over the tokens that count, and the norm of its gradient."""
    import torch

    labels = torch.stack([row["labels"] for row in rows]).flatten()
    mask = torch.stack([row["loss_mask"] for row in rows]).flatten() > 0
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1)[mask], labels[mask])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss), float(torch.cat([each.flatten() for each in gradients]).norm())


def largest(difference: Any) -> float:
    """The largest absolute value."""
    return float(difference.abs().max())
