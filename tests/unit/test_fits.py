"""What does not go together, and what a machine cannot do, is refused with the reason before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_octo.config.train import ComputeConfig, MidTrainConfig, ParallelConfig, PrecisionConfig
from megatron_octo.errors import BadInput, SettingsError
from megatron_octo.model.build import check_platform, fp8_missing, usable_precision
from megatron_octo.platform import Platform
from megatron_octo.platform.fp8 import NEEDS, lacking, running
from tests.prepared import stage

CPU = Platform(device="cpu", backend="gloo", layer_family="local")
H100 = Platform(
    device="cuda", backend="nccl", layer_family="transformer_engine", chip=(9, 0), cuda=(13, 0), engine=(2, 20, 2)
)
CHIPS = {"A100": (8, 0), "L40": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}


@pytest.fixture
def config(tmp_path: Path) -> MidTrainConfig:
    small = stage(tmp_path, "small")
    model = replace(small.model, hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1024)
    data = replace(small.data, seq_length=128)
    budget = replace(small.budget, train_tokens=20 * 8 * 128)
    return replace(small, model=replace(model, max_positions=128), data=data, budget=budget)


def fp8(recipe: str, **options: Any) -> PrecisionConfig:
    return PrecisionConfig(dtype="bf16", fp8=recipe, **options)  # type: ignore[arg-type]


REFUSED = {
    "fsdp-optimizer": ({"parallel": ParallelConfig(fsdp=True)}, r"fsdp with parallel\.distributed_optimizer"),
    "fsdp-overlap": (
        {"parallel": ParallelConfig(fsdp=True, distributed_optimizer=False, overlap_grad_reduce=True)},
        r"fsdp with parallel\.overlap_grad_reduce",
    ),
    "fsdp-pipeline": (
        {"parallel": ParallelConfig(fsdp=True, distributed_optimizer=False, pipeline=2)},
        r"fsdp with parallel\.pipeline 2",
    ),
    "graphs-fsdp": (
        {
            "compute": ComputeConfig(cuda_graphs=True),
            "parallel": ParallelConfig(fsdp=True, distributed_optimizer=False),
        },
        r"cuda_graphs with parallel\.fsdp",
    ),
    "context-length": ({"parallel": ParallelConfig(context=3)}, r"parallel\.context 3: each rank takes two of 6"),
    "graphs-recompute": (
        {"compute": ComputeConfig(cuda_graphs=True, recompute="selective")},
        r"cuda_graphs with compute\.recompute selective",
    ),
    "graphs-emulation": (
        {"compute": ComputeConfig(cuda_graphs=True), "precision": fp8("mxfp8", fp8_emulation=True)},
        r"cuda_graphs with precision\.fp8_emulation",
    ),
    "delayed-bf16-layers": ({"precision": fp8("delayed", bf16_first_layers=1)}, r"with precision\.fp8 delayed"),
    "too-many-bf16-layers": (
        {"precision": fp8("mxfp8", bf16_first_layers=3), "parallel": ParallelConfig(pipeline=2)},
        r"bf16_first_layers 3 .* of 4 layers, 2 a pipeline",
    ),
    "weights-emulated": (
        {"precision": fp8("tensorwise", fp8_weights=True, fp8_emulation=True)},
        r"fp8_weights with precision\.fp8_emulation",
    ),
    "weights-alone": (
        {
            "precision": fp8("tensorwise", fp8_weights=True),
            "parallel": ParallelConfig(distributed_optimizer=False),
        },
        r"fp8_weights with parallel\.distributed_optimizer off",
    ),
    "weights-mxfp8-gather": (
        {
            "precision": fp8("mxfp8", fp8_weights=True),
            "parallel": ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
        },
        r"fp8_weights with precision\.fp8 mxfp8 and parallel\.overlap_param_gather",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_go_together_are_refused(name, config):
    changes, message = REFUSED[name]
    with pytest.raises(SettingsError, match=message):
        replace(config, **changes)


def test_the_feed_forward_layer_is_cut_into_equal_parts(config):
    with pytest.raises(SettingsError, match=r"ffn_size 65 does not divide by parallel\.tensor 2"):
        replace(config, model=replace(config.model, ffn_size=65), parallel=ParallelConfig(tensor=2))


def test_sequence_parallel_ranks_have_equal_parts_of_a_sequence(config):
    odd = replace(
        config,
        data=replace(config.data, seq_length=31),
        budget=replace(config.budget, train_tokens=31 * config.budget.batch_sequences),
        parallel=ParallelConfig(tensor=2),
    )
    with pytest.raises(SettingsError, match=r"seq_length 31 with parallel\.sequence, tensor 2"):
        replace(odd, parallel=ParallelConfig(tensor=2, sequence=True))


def test_cuda_graphs_need_shapes_that_do_not_change(config):
    with pytest.raises(SettingsError, match=r"cuda_graphs with data\.across_documents off"):
        replace(config, compute=ComputeConfig(cuda_graphs=True), data=replace(config.data, across_documents=False))


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"dtype": "fp32", "fp8": "mxfp8"}, r"fp8 mxfp8 with precision\.dtype fp32"),
        ({"fp8_weights": True}, r"fp8_weights with precision\.fp8 off"),
        ({"fp8": "mxfp8", "bf16_last_layers": -1}, r"bf16_last_layers -1 is below 0"),
    ],
)
def test_a_precision_that_contradicts_itself_is_refused(precision, message):
    with pytest.raises(SettingsError, match=message):
        PrecisionConfig(**precision)


@pytest.mark.parametrize(
    ("recipe", "multiple"), [("delayed", 16), ("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)]
)
def test_a_side_that_fp8_blocks_do_not_divide_is_refused(recipe, multiple, config):
    fitting = replace(config, precision=fp8(recipe))
    odd = replace(config.model, ffn_size=1024 + multiple // 2)
    with pytest.raises(SettingsError, match=rf"{recipe} multiplies in blocks of {multiple}, and model\.ffn_size"):
        replace(fitting, model=odd)
    replace(fitting, model=odd, precision=fp8(recipe, fp8_emulation=True))  # which pads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelConfig(context=2)}, r"context 2 needs Transformer Engine"),
        ({"compute": ComputeConfig(cuda_graphs=True)}, r"cuda_graphs needs a GPU"),
        ({"precision": fp8("tensorwise")}, r"tensorwise needs a GPU \(Ada, Hopper or later\)"),
    ],
)
def test_a_cpu_refuses_what_needs_a_gpu_and_a_gpu_does_not(changes, message, config):
    asked = replace(config, **changes)
    assert asked.asks_of_the_machine
    with pytest.raises(BadInput, match=message):
        check_platform(asked, CPU)
    check_platform(asked, H100)


def test_plain_settings_ask_nothing_of_the_machine(config):
    assert not config.asks_of_the_machine
    check_platform(config, CPU)


def test_each_chip_runs_the_recipes_it_can():
    can = {name: running(replace(H100, chip=chip)) for name, chip in CHIPS.items()}
    assert can == {
        "A100": [],
        "L40": ["delayed", "tensorwise"],
        "H100": ["delayed", "tensorwise", "blockwise"],
        "B200": ["delayed", "tensorwise", "mxfp8"],
        "RTX 5090": ["delayed", "tensorwise"],
    }


@pytest.mark.parametrize("recipe", NEEDS)
def test_an_old_version_is_named_with_the_one_that_is_needed(recipe):
    machine = replace(H100, chip=NEEDS[recipe].chip_from)
    assert lacking(recipe, machine) is None
    assert "Transformer Engine 2." in str(lacking(recipe, replace(machine, engine=(1, 14))))
    assert "CUDA 12." in str(lacking(recipe, replace(machine, cuda=(11, 8))))
    assert lacking(recipe, replace(machine, layer_family="local")) == "Transformer Engine"


def test_the_message_names_the_recipes_that_run_here(config):
    with pytest.raises(BadInput, match="mxfp8 needs Blackwell") as found:
        check_platform(replace(config, precision=fp8("mxfp8")), H100)
    assert "choose a recipe that runs here (delayed, tensorwise, blockwise)" in str(found.value.fix)


def test_the_fallback_is_bf16_where_the_recipe_is_missing_and_fp8_where_it_is_not(config):
    wanted = fp8("blockwise", fp8_weights=True, fp8_fallback=True)
    check_platform(replace(config, precision=wanted), CPU)
    assert "a GPU" in str(fp8_missing(wanted, CPU))
    used = usable_precision(wanted, CPU)
    assert (used.fp8, used.fp8_weights, used.dtype) == ("off", False, "bf16")
    assert usable_precision(wanted, H100) == wanted


def test_emulation_lacks_nothing_anywhere(config):
    emulated = fp8("mxfp8", fp8_emulation=True)
    assert fp8_missing(emulated, CPU) is None
    assert usable_precision(emulated, CPU) == emulated
