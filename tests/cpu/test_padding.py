"""A vocabulary with rows beyond the tokenizer's ids: they have no part in the loss, at any tensor-parallel size."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import FromImport, MidTrainConfig, ParallelConfig
from megatron_octo.convert import torch_dist
from megatron_octo.model import mapping
from tests.cpu.zygote import Zygote, octo, rows
from tests.prepared import MODEL, VOCAB, stage, write_data

ROWS = 96  # of four tensor-parallel ranks' 24, the third's are padding in part, the last's wholly
TOLERANCE = 5e-6  # CONTRIBUTING.md
EMBEDDING = "embedding.word_embeddings.weight"
PADDING = 1.0  # far above what else is in the embedding
STEPS, SAVED = 10, 5
LAYOUTS = {"tp1": ParallelConfig(), "tp2": ParallelConfig(tensor=2), "tp4": ParallelConfig(tensor=4, sequence=True)}

pytestmark = pytest.mark.timeout(600)


def write_import(folder: Path, model: ModelConfig) -> None:
    """Weights that are the same but for the embedding's rows beyond VOCAB."""
    pieces, draw = [], torch.Generator().manual_seed(0)
    for weight in mapping.weights(replace(model, vocab_size=VOCAB)):
        numbers = torch.randn(weight.shape, generator=draw) * 0.02 + (len(weight.shape) == 1)
        if weight.key == EMBEDDING:
            numbers = torch.cat([numbers, torch.full((model.vocab_size - VOCAB, model.hidden_size), PADDING)])
        stacked = weight.layer is not None
        pieces.append(
            torch_dist.Piece(
                key=weight.key,
                global_shape=(model.num_layers, *numbers.shape) if stacked else tuple(numbers.shape),
                offset=(weight.layer or 0, *[0] * len(numbers.shape[not stacked :])),
                shape=(1, *numbers.shape) if stacked else tuple(numbers.shape),
                dtype=torch.float32,
                make=lambda numbers=numbers, stacked=stacked: numbers[None] if stacked else numbers,
            )
        )
    folder.mkdir()
    torch_dist.write(folder, pieces)
    rundir.write_json(folder / "model.json", to_dict(model))
    rundir.mark_done(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """The runs `exact`, of a vocabulary without padding, and `tp1`, `tp2`, `tp4` with it; `tp4-then-tp1`."""
    folder = tmp_path_factory.mktemp("padding")
    write_data(folder / "data")
    runs = folder / "runs"

    def config(name: str, vocab_size: int, parallel: ParallelConfig) -> MidTrainConfig:
        model = replace(MODEL, num_kv_heads=4, vocab_size=vocab_size)
        if not (folder / str(vocab_size)).exists():
            write_import(folder / str(vocab_size), model)
        small = stage(folder / "data", name, steps=STEPS, save_every=SAVED)
        start = FromImport(path=folder / str(vocab_size))
        numbers = replace(small.optimizer, weight_decay=0.0)
        return replace(small, model=model, start=start, parallel=parallel, optimizer=numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTO_RUNS", str(runs))
        assert octo(zygote, config("exact", VOCAB, ParallelConfig()), folder).wait() == [0]
        for name, parallel in LAYOUTS.items():
            codes = octo(zygote, config(name, ROWS, parallel), folder, ranks=parallel.tensor).wait()
            assert set(codes) == {0}, (folder / "log").read_text()[-3000:]
        again = config("tp4-then-tp1", ROWS, ParallelConfig())
        rundir.write_json(runs / again.name / "config.json", to_dict(replace(again, log_every_steps=1)))
        for name in ("lineage.json", "metrics.jsonl", f"checkpoints/step_{SAVED:08d}"):
            source, target = runs / "tp4" / name, runs / again.name / name
            target.parent.mkdir(exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        assert octo(zygote, again, folder).wait() == [0]
    return folder


@pytest.mark.parametrize("name", [*LAYOUTS, "tp4-then-tp1"])
def test_padding_changes_no_loss_and_no_gradient(name, folder):
    ours, theirs = rows(folder / "runs" / name), rows(folder / "runs" / "exact")
    assert len(ours) == len(theirs) == STEPS
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=TOLERANCE)
    assert [row[3] for row in ours] == pytest.approx([row[3] for row in theirs], rel=1e-5)


def test_a_save_of_four_tensor_parallel_ranks_goes_on_with_one(folder):
    assert f"resumed after step {SAVED}" in (folder / "log").read_text()
    ours = rows(folder / "runs" / "tp4-then-tp1")
    assert ours[:SAVED] == rows(folder / "runs" / "tp4")[:SAVED]
    assert ours[SAVED:] != rows(folder / "runs" / "tp4")[SAVED:]  # one rank did run


@pytest.mark.parametrize("name", [*LAYOUTS, "tp4-then-tp1"])
def test_padding_has_exactly_no_gradient(name, folder):
    reader = torch_dist.Reader(rundir.step_folder(folder / "runs" / name, STEPS))
    for moment in ("exp_avg", "exp_avg_sq"):
        numbers = reader.read(f"optimizer.state.{moment}.{EMBEDDING}")
        assert torch.count_nonzero(numbers[VOCAB:]) == 0
        assert torch.count_nonzero(numbers[:VOCAB])
    assert torch.all(reader.read(EMBEDDING)[VOCAB:] == PADDING)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_rows_are_the_models_at_any_tensor_parallel_size(name, folder):
    reader = torch_dist.Reader(rundir.step_folder(folder / "runs" / name, STEPS))
    assert reader.shape(EMBEDDING) == (ROWS, MODEL.hidden_size)
