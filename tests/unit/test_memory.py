"""The arithmetic of a rank's memory; `tests/cpu/test_memory.py` compares it with megatron-core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import ComputeConfig, MidTrainConfig, ParallelConfig, PrecisionConfig
from megatron_octo.plan.memory import GIB, layer_bytes, rank_memory, stage_memory, stage_parameters
from tests.prepared import stage

MODEL = ModelConfig(
    hidden_size=1024,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    ffn_size=4096,
    vocab_size=32_000,
    tied_embeddings=True,
    qkv_bias=True,
)
FP8 = PrecisionConfig(fp8="tensorwise", bf16_first_layers=1, bf16_last_layers=1)


@pytest.fixture
def config() -> MidTrainConfig:
    """A stage of `MODEL` in bf16, on two sequences of 32 tokens."""
    return replace(stage(Path("nowhere"), "x"), model=MODEL, precision=PrecisionConfig())


def parts(config: MidTrainConfig, ranks: int) -> dict[str, int]:
    return {part.name: part.bytes for part in rank_memory(config, config.resolve(ranks)).parts}


def test_the_lines_of_the_arithmetic_add_up(config):
    memory = rank_memory(config, config.resolve(2))
    assert sum(part.bytes for part in memory.parts) == pytest.approx(memory.total_gib * GIB)
    lines = memory.arithmetic().splitlines()
    assert f"{memory.total_gib:.1f} GiB" in lines[0]
    assert len(lines) == 1 + len(memory.parts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_the_stages_hold_the_model_and_a_tied_table_at_both_ends(config, tied, pipeline):
    model = replace(MODEL, tied_embeddings=tied)
    cut = replace(config, model=model, parallel=ParallelConfig(pipeline=pipeline))
    twice = model.vocab_size * model.hidden_size if tied and pipeline > 1 else 0
    assert sum(stage_parameters(cut, i) for i in range(pipeline)) == model.num_parameters + twice


def test_fp8_keeps_two_more_bytes_of_a_matrix_and_one_less_of_its_input(config):
    fp8 = replace(config, precision=FP8)
    h, f, qkv = MODEL.hidden_size, MODEL.ffn_size, MODEL.head_dim * (MODEL.num_heads + 2 * MODEL.num_kv_heads)
    matrices = h * qkv + h * h + 3 * h * f
    assert parts(fp8, 1)["FP8 weights"] == 6 * matrices * 2  # the first and the last of 8 layers stay in bf16
    saved = 2 * h + f - h  # both norms' results and gate x up by a byte each; but a byte for the attention's result
    assert layer_bytes(fp8, fp8=False) - layer_bytes(fp8, fp8=True) == saved
    lighter = parts(replace(fp8, precision=replace(FP8, fp8_weights=True)), 1)
    assert parts(fp8, 1)["weights"] - lighter["weights"] == 6 * matrices * 2


def test_the_optimizer_is_shared_by_data_and_context_ranks(config):
    alone = parts(config, 1)["optimizer"]
    assert alone == MODEL.num_parameters * 12
    assert parts(config, 4)["optimizer"] == alone / 4
    context = replace(config, parallel=ParallelConfig(context=2))
    assert parts(context, 4)["optimizer"] == alone / 4
    whole = replace(config, parallel=ParallelConfig(distributed_optimizer=False))
    assert parts(whole, 4)["optimizer"] == alone


def test_context_parallelism_shares_the_tokens(config):
    context = replace(config, parallel=ParallelConfig(context=2))
    for name in ("activations", "logits"):
        assert parts(context, 2)[name] == parts(config, 1)[name] / 2


def test_recomputation_keeps_less_and_one_layer_whole(config):
    kept = {}
    for recompute in ("none", "selective", "full"):
        compute = ComputeConfig(recompute=recompute)
        kept[recompute] = parts(replace(config, compute=compute), 1)["activations"]
    assert kept["full"] < kept["selective"] < kept["none"]
    tokens, whole = 64, layer_bytes(config, fp8=False)
    inputs = 2 * MODEL.hidden_size
    assert kept["full"] == tokens * (8 * inputs + whole - inputs)


def test_the_first_stage_has_more_in_flight_and_the_last_the_logits(config):
    cut = replace(config, parallel=ParallelConfig(pipeline=4))
    first, last = ({p.name: p.bytes for p in stage_memory(cut, cut.resolve(4), i).parts} for i in (0, 3))
    assert first["activations"] == 4 * last["activations"]
    assert "logits" in last and "logits" not in first
    assert rank_memory(cut, cut.resolve(4)).stage == 0


def test_interleaving_costs_the_first_stage_what_korthikanti_et_al_say(config):
    """Section 4.2.3: L x (1 + (p - 1) / (p m)) layers in flight on the first stage, for p stages of m chunks."""
    many = replace(config, budget=replace(config.budget, micro_batch_sequences=1))
    cut = replace(many, parallel=ParallelConfig(pipeline=4, virtual_pipeline=2))
    plain = replace(many, parallel=ParallelConfig(pipeline=4))
    first, without = (stage_memory(each, each.resolve(4), 0).parts for each in (cut, plain))
    activations, plain_activations = ({p.name: p.bytes for p in each}["activations"] for each in (first, without))
    assert activations == plain_activations * (1 + 3 / 8)
