"""The memory of a rank on paper against what megatron-core holds: one launch of two ranks (`footprint.py`).

What the CPU's unfused layers keep beyond the plan's, which are fused, is known and added here, so that the rest is
compared to the byte, but for some ids and masks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_octo.config.train import MidTrainConfig
from megatron_octo.plan.memory import DTYPE_BYTES, chunks_in_flight, layer_bytes, stage_memory, stage_parameters
from megatron_octo.rundir import read_json
from tests.cpu.footprint import CASES, MICRO_BATCHES, PIPELINES, SEQ_LENGTH, TIED, case
from tests.cpu.zygote import Zygote

LAUNCH_TIMEOUT_S = 400
PADDING = 0.01  # megatron rounds the buffers of gradients and moments up to 128 elements a rank
IDS = 64  # bytes a token of ids, targets and masks, which the plan leaves out
WHOLE = [name for name in CASES if case(name).parallel.pipeline == 1]
MICRO_BATCH_TOKENS = case(WHOLE[0]).budget.micro_batch_sequences * SEQ_LENGTH

pytestmark = pytest.mark.timeout(LAUNCH_TIMEOUT_S + 60)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("footprint")
    zygote.run("tests.cpu.footprint:main", folder, log=folder / "log", ranks=2, timeout_s=LAUNCH_TIMEOUT_S)
    return [read_json(folder / f"{rank}.json") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_the_parameters_gradients_and_moments_that_the_plan_says(name, rows):
    config = case(name)
    for row in (ranks[name] for ranks in rows):
        planned = parts(config, row["stage"])
        assert row["parameters"] == stage_parameters(config, row["stage"])
        assert row["weights"] == planned["weights"]
        assert row["gradients"] == pytest.approx(planned["gradients"], rel=PADDING)
        assert row["optimizer"] == pytest.approx(planned["optimizer"], rel=PADDING)


@pytest.mark.parametrize("name", WHOLE)
def test_a_forward_pass_keeps_the_activations_that_the_plan_says(name, rows):
    config, tokens = case(name), MICRO_BATCH_TOKENS
    planned = parts(config)
    expected = planned["activations"] + planned["logits"] - transient_logits(config) + beyond_the_plan(config)
    assert 0 <= rows[0][name]["kept"] - expected <= IDS * tokens


@pytest.mark.parametrize("name", WHOLE)
def test_full_recomputation_keeps_the_inputs_of_the_layers_alone(name, rows):
    config, tokens = case(name), MICRO_BATCH_TOKENS
    per_layer = layer_bytes(config, fp8=False, recompute="full")
    expected = tokens * config.model.num_layers * per_layer + parts(config)["logits"] - transient_logits(config)
    expected += tokens * norm_beyond(config)
    assert 0 <= rows[0][name]["kept_recomputed"] - expected <= IDS * tokens


@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_rank_runs_ahead_as_megatrons_schedule_does(name, micro_batches, rows):
    config = replace(case(WHOLE[0]), parallel=PIPELINES[name], model=replace(TIED, num_layers=12))
    plan = replace(case(WHOLE[0]).resolve(1), num_micro_batches=micro_batches)
    ours = [chunks_in_flight(config, plan, stage) for stage in range(4)]
    assert ours == rows[0]["in_flight"][f"{name} {micro_batches}"]


def parts(config: MidTrainConfig, stage: int = 0) -> dict[str, int]:
    """What the plan says, by name."""
    return {part.name: part.bytes for part in stage_memory(config, config.resolve(2), stage).parts}


def transient_logits(config: MidTrainConfig) -> int:
    """Logits in bf16: they are there at the peak, but their fp32 copy is what is kept."""
    ids = config.model.vocab_size // config.parallel.tensor
    return 2 * MICRO_BATCH_TOKENS * ids if config.precision.dtype == "bf16" else 0


def beyond_the_plan(config: MidTrainConfig) -> int:
    """What the CPU's unfused layers keep, and fused ones do not."""
    model, tensor = config.model, config.parallel.tensor
    dtype = DTYPE_BYTES[config.precision.dtype]
    result = model.num_heads * model.head_dim * dtype  # the attention's, once more with the heads side by side
    swiglu = model.ffn_size * dtype  # silu(gate)
    norms = 0
    if model.qk_norm:  # as `norm_beyond`; their input is a view that holds values too, and a copy of the queries
        copied = model.num_heads if model.num_kv_heads > tensor else 0  # unless a rank has one group
        norms = 4 * (model.num_heads + model.num_kv_heads) + (copied + model.num_kv_heads) * model.head_dim * dtype
    layer = 2 * norm_beyond(config) + (result + swiglu + norms) // tensor
    rotary = SEQ_LENGTH * 4 * model.head_dim * 4  # sines and cosines, of queries and of keys
    return MICRO_BATCH_TOKENS * (model.num_layers * layer + norm_beyond(config)) + model.num_layers * rotary


def norm_beyond(config: MidTrainConfig) -> int:
    """Bytes a token that our RMSNorm keeps besides its input: the root mean square."""
    return 4 // (config.parallel.tensor if config.parallel.sequence else 1)
