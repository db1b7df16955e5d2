"""What only a GPU can show: Transformer Engine's layers and FP8, CUDA graphs, documents cut by its attention, memory.

Each stage is `octo train` on one GPU, 20 steps from a save that the CPU wrote in fp32; it is held against the same
stage on the CPU, or against BF16. On a machine with one: `pytest tests/gpu`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo import rundir
from megatron_octo.config.base import to_dict
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.schedule import ConstantRate
from megatron_octo.config.train import ComputeConfig, FromRun, MidTrainConfig, ParallelConfig, PrecisionConfig
from megatron_octo.plan.memory import rank_memory
from megatron_octo.platform import fp8, resolve
from tests.conftest import REPOSITORY
from tests.prepared import VOCAB, stage, write_source, write_tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.timeout(600),
]
STEPS, SAVED = 20, 10
MODEL = ModelConfig(  # each side of a matrix divides by 128, as FP8's blocks ask
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=768,
    vocab_size=VOCAB,
    tied_embeddings=True,
    rope_theta=10_000.0,
    max_positions=128,
)
NEAR_FP32 = 0.05
"""Largest difference of a BF16 loss from fp32's."""
FP8_SHARE = 0.02
"""Largest share by which FP8's mean loss may be above BF16's."""
BF16 = PrecisionConfig(dtype="bf16")
FSDP = ParallelConfig(fsdp=True, distributed_optimizer=False)
SAME = {  # what may not move BF16's losses by more than its rounding does
    "recompute-selective": {"compute": ComputeConfig(recompute="selective")},
    "recompute-full": {"compute": ComputeConfig(recompute="full")},
    "cuda-graphs": {"compute": ComputeConfig(cuda_graphs=True)},
    "overlap": {"parallel": ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)},
    "fsdp": {"parallel": FSDP},
}
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the run `base` that the CPU trained for a step in fp32."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("gpu")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer = write_tokenizer(folder / "data" / "tokenizer", words.to_str())  # a whole one: an export takes it along
    for seed, name in enumerate(("a", "b")):
        write_source(folder / "data" / name, tokenizer, seed=seed)
    octo_train(folder, small(folder, "base", steps=1), cpu=True)
    return folder


def small(folder: Path, name: str, *, steps: int) -> MidTrainConfig:
    """A stage of MODEL at a rate so low that rounding does not grow; 128 tokens a micro-batch, as FP8 asks."""
    config = stage(folder / "data", name, steps=steps, save_every=SAVED)
    budget = replace(config.budget, micro_batch_sequences=4)
    return replace(config, model=MODEL, budget=budget, learning_rate=ConstantRate(peak=3e-4))


def octo_train(folder: Path, config: MidTrainConfig, *, cpu: bool = False) -> list[dict[str, Any]]:
    """Train a stage; the rows of its metrics."""
    settings = folder / f"{config.name}.json"
    rundir.write_json(settings, to_dict(config))
    octo(folder, "train", str(settings), cpu=cpu)
    return [json.loads(line) for line in (folder / "runs" / config.name / "metrics.jsonl").read_text().splitlines()]


def octo(folder: Path, *args: str, cpu: bool = False) -> str:
    """Run a command to its good end; what it logged."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_octo", *args],
        cwd=REPOSITORY,
        env={**os.environ, "OCTO_RUNS": str(folder / "runs"), **hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def train(folder: Path) -> Train:
    """Train 20 steps from `base` with some settings changed, on the GPU unless `cpu`; the losses. Once each."""
    taken: dict[str, list[dict[str, Any]]] = {}

    def run(name: str, *, cpu: bool = False, **changes: Any) -> list[dict[str, Any]]:
        if name not in taken:
            start = FromRun(run="base", optimizer=False)
            config = replace(small(folder, name, steps=STEPS), start=start, precision=BF16)
            taken[name] = octo_train(folder, replace(config, **changes), cpu=cpu)
        return taken[name]

    return run


def losses(rows: list[dict[str, Any]]) -> list[float]:
    assert len(rows) == STEPS
    return [row["train/loss"] for row in rows]


def test_the_layers_are_transformer_engines(folder: Path, train: Train) -> None:
    assert resolve().layer_family == "transformer_engine", "install it as requirements/gpu.in says"
    train("bf16")
    layout = rundir.read_json(folder / "runs/bf16/checkpoints" / f"step_{STEPS:08d}" / "state.json")["layout"]
    assert layout.endswith("layers transformer_engine")


def test_bf16_on_a_gpu_is_near_fp32_on_the_cpu(train: Train) -> None:
    reference = losses(train("fp32-cpu", cpu=True, precision=PrecisionConfig(dtype="fp32")))
    assert losses(train("bf16")) == pytest.approx(reference, abs=NEAR_FP32)


def test_documents_cut_by_the_attention_are_those_the_cpu_cuts(folder: Path, train: Train) -> None:
    data = replace(stage(folder / "data", "x", steps=1).data, across_documents=False)
    reference = losses(train("cut-cpu", cpu=True, data=data, precision=PrecisionConfig(dtype="fp32")))
    cut = losses(train("cut", data=data))
    assert cut == pytest.approx(reference, abs=NEAR_FP32)
    assert cut != losses(train("bf16"))


@pytest.mark.parametrize("name", SAME)
def test_what_is_computed_does_not_depend_on_how(name: str, train: Train) -> None:
    assert losses(train(name, **SAME[name])) == pytest.approx(losses(train("bf16")), abs=5e-3)


def precision_of(recipe: str, **options: Any) -> PrecisionConfig:
    """FP8 by a recipe; skips where the chip or a version is too old."""
    missing = fp8.lacking(recipe, resolve())
    if missing:
        pytest.skip(f"{recipe} needs {missing}")
    return PrecisionConfig(dtype="bf16", fp8=recipe, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", fp8.NEEDS)
@pytest.mark.parametrize("options", [{}, {"fp8_weights": True}], ids=["", "fp8-weights"])
def test_fp8_learns_as_bf16_does(recipe: str, options: dict[str, Any], train: Train) -> None:
    rows = train(f"{recipe}{'-weights' * bool(options)}", precision=precision_of(recipe, **options))
    ours, theirs = (statistics.mean(losses(each)[-5:]) for each in (rows, train("bf16")))
    assert ours == pytest.approx(theirs, rel=FP8_SHARE)
    assert losses(rows) != losses(train("bf16")), "FP8 rounds more"


def test_layers_at_both_ends_may_stay_in_bf16(train: Train) -> None:
    whole = losses(train("tensorwise", precision=precision_of("tensorwise")))
    ends = losses(train("ends", precision=precision_of("tensorwise", bf16_first_layers=1, bf16_last_layers=1)))
    assert ends != whole
    assert ends == pytest.approx(losses(train("bf16")), abs=NEAR_FP32)


def test_a_gpus_save_is_read_on_a_cpu_and_becomes_a_verified_export(folder: Path, train: Train) -> None:
    def config(name: str, steps: int) -> MidTrainConfig:
        start = FromRun(run="base", optimizer=False)
        return replace(small(folder, name, steps=steps), start=start, precision=BF16)

    losses(octo_train(folder, config("parent", STEPS)))
    first = folder / "runs/parent/checkpoints/step_00000010"
    branch = replace(config("child", 10), start=FromRun(run="parent", step=10))
    octo_train(folder, branch, cpu=True)
    octo(folder, "convert", "to-hf", str(first), str(folder / "hf"), cpu=True)
    assert rundir.read_json(folder / "hf/verify.json")["num_argmax_differences"] == 0


@pytest.mark.parametrize(
    ("name", "parallel"), [("large", ParallelConfig()), ("large-fsdp", FSDP)], ids=["distributed-optimizer", "fsdp"]
)
def test_memory_is_as_planned(folder: Path, name: str, parallel: ParallelConfig) -> None:
    """A model whose states and activations outweigh what CUDA itself takes."""
    model = replace(MODEL, hidden_size=2048, num_heads=32, num_kv_heads=8, ffn_size=8192)
    config = replace(stage(folder / "data", name, steps=3), model=model, precision=BF16, parallel=parallel)
    memory = rank_memory(config, config.resolve(1))
    planned = sum(part.bytes for part in memory.parts if part.name != "reserve") / 2**30
    assert octo_train(folder, config)[-1]["memory/peak_gib"] == pytest.approx(planned, rel=0.2)
