"""The table between Hugging Face and megatron: names, shapes, joins, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from megatron_octo.config.load import load_recipe
from megatron_octo.config.model import ModelConfig
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping
from tests.conftest import REPOSITORY

MODEL = ModelConfig(
    hidden_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=2,  # not hidden_size / num_heads
    ffn_size=10,
    vocab_size=16,
    tied_embeddings=False,
    rope_factor=32.0,
    rope_theta=500_000.0,
    max_positions=131_072,
)
QWEN2 = replace(MODEL, qkv_bias=True, rope_factor=None, norm_eps=1e-6)
QWEN3 = replace(MODEL, qk_norm=True, rope_factor=None, norm_eps=1e-6)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NUMBERS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
)


def hf_dict(model: ModelConfig = MODEL, **changes: Any) -> dict[str, Any]:
    whole = mapping.hf_config(model, dtype="bfloat16", bos=1, eos=2)
    return {**whole, **({"architectures": None} if "model_type" in changes else {}), **changes}


def weight(name_part: str, model: ModelConfig = MODEL) -> mapping.Weight:
    return next(each for each in mapping.weights(model) if name_part in each.key)


@pytest.mark.parametrize(("whole", "kind"), [(MODEL, "Llama"), (QWEN2, "Qwen2"), (QWEN3, "Qwen3")])
def test_every_tensor_of_transformers_models_has_its_place(whole: ModelConfig, kind: str) -> None:
    import transformers

    for model in (whole, replace(whole, tied_embeddings=True)):
        config = mapping.hf_config(model, dtype="float32")
        assert config["architectures"] == [f"{kind}ForCausalLM"]
        with torch.device("meta"):
            theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
        shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
        assert mapping.hf_shapes(model) == shapes
        assert sum(prod(shape) for shape in shapes.values()) == model.num_parameters


def test_transformers_reads_the_config_as_it_is_meant() -> None:
    from transformers import LlamaConfig

    read = LlamaConfig(**hf_dict())
    assert read.dtype == torch.bfloat16
    assert read.rope_parameters == {**LLAMA3_SCALING, "factor": 32.0, "rope_theta": 500_000.0}
    assert (read.head_dim, read.num_key_value_heads, read.max_position_embeddings) == (2, 3, 131_072)
    assert mapping.model_config_from_hf(read.to_dict()) == MODEL  # what transformers 5 writes


@pytest.mark.parametrize("model", [QWEN2, QWEN3])
def test_transformers_and_we_read_each_others_qwen_configs(model: ModelConfig) -> None:
    from transformers import Qwen2Config, Qwen3Config

    read = (Qwen3Config if model.qk_norm else Qwen2Config)(**hf_dict(model))
    assert (read.rope_parameters["rope_theta"], read.head_dim, read.sliding_window) == (500_000.0, 2, None)
    assert mapping.model_config_from_hf(read.to_dict()) == model


LLAMA_70B = ModelConfig(
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    ffn_size=28_672,
    vocab_size=128_256,
    tied_embeddings=False,
    rope_factor=8.0,
    max_positions=131_072,
)
QWEN3_8B = ModelConfig(
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=12_288,
    vocab_size=151_936,
    tied_embeddings=False,
    qk_norm=True,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=40_960,
)
QWEN3_SMALL = replace(QWEN3_8B, hidden_size=1024, num_layers=28, num_heads=16, ffn_size=3072, tied_embeddings=True)
PUBLISHED = {
    "llama32_1b": (1_235_814_400, 32.0),
    "llama32_3b": (3_212_749_824, 32.0),
    "llama31_8b": (8_030_261_248, 8.0),
    LLAMA_70B: (70_553_706_496, 8.0),
    "qwen25_1_5b": (1_543_714_304, None),
    "qwen25_7b": (7_615_616_512, None),
    QWEN3_SMALL: (596_049_920, None),
    QWEN3_8B: (8_190_735_360, None),
}
"""Recipe or model -> (parameters, factor of the rotary scaling)."""


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(source: str | ModelConfig) -> None:
    num_parameters, factor = PUBLISHED[source]
    if isinstance(source, str):
        recipe = f"{REPOSITORY / 'recipes' / source}.py:stable_200b"
        source = load_recipe(recipe, MidTrainConfig).model
    model = mapping.model_config_from_hf(hf_dict(source))
    assert model == source and model.rope_factor == factor
    assert model.num_parameters == sum(prod(shape) for shape in mapping.hf_shapes(model).values()) == num_parameters


def test_biases_are_joined_group_by_group_as_their_matrices_are() -> None:
    bias = weight("linear_qkv.bias", QWEN2)
    parts = [torch.arange(shape[0]) + 1000 * i for i, (_, shape) in enumerate(bias.parts)]
    columns = weight("linear_qkv.weight", QWEN2).join([part[:, None].expand(-1, 24) for part in parts])
    assert torch.equal(bias.join(parts), columns[:, 0])


def test_queries_keys_and_values_are_joined_group_by_group() -> None:
    qkv = weight("linear_qkv.weight")
    q, k, v = (torch.arange(prod(shape)).reshape(shape) + 1000 * i for i, (_, shape) in enumerate(qkv.parts))
    joined = qkv.join([q, k, v])
    # two query heads of two rows a group, then its key and its value
    rows = [t for g in range(3) for t in (q[4 * g : 4 * g + 4], k[2 * g : 2 * g + 2], v[2 * g : 2 * g + 2])]
    assert torch.equal(joined, torch.cat(rows))


def test_gate_comes_before_up() -> None:
    fc1 = weight("linear_fc1.weight")
    gate, up = torch.zeros(10, 24), torch.ones(10, 24)
    assert torch.equal(fc1.join([gate, up]), torch.cat([gate, up]))


def test_split_undoes_join_for_every_tensor() -> None:
    for each in (weight for model in (MODEL, QWEN2, QWEN3) for weight in mapping.weights(model)):
        parts = [torch.randn(shape) for _, shape in each.parts]
        joined = each.join(parts)
        assert joined.shape == each.shape
        assert all(torch.equal(a, b) for a, b in zip(each.split(joined), parts, strict=True))


def test_layers_are_stacked_in_the_save_and_nothing_else_is() -> None:
    shapes = {each.key: mapping.stacked_shape(each, MODEL) for each in mapping.weights(MODEL)}
    assert shapes["decoder.layers.mlp.linear_fc2.weight"] == (2, 24, 10)
    assert shapes["embedding.word_embeddings.weight"] == shapes["output_layer.weight"] == (16, 24)
    assert [each.layer for each in mapping.weights(MODEL)] == [None, *[0] * 6, *[1] * 6, None, None]


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [MODEL, QWEN2, QWEN3])
def test_settings_survive_the_way_there_and_back(whole: ModelConfig, factor: float | None, tied: bool) -> None:
    model = replace(whole, rope_factor=factor, tied_embeddings=tied, norm_eps=1e-6, rope_theta=10_000.0)
    assert mapping.model_config_from_hf(mapping.hf_config(model, dtype="float32")) == model


def test_both_spellings_of_the_rotary_scaling_are_read() -> None:
    new = {**LLAMA3_SCALING, "rope_theta": 500_000.0}
    both = [
        mapping.model_config_from_hf(hf_dict(rope_scaling=LLAMA3_SCALING, rope_theta=500_000.0)),
        mapping.model_config_from_hf(hf_dict(rope_parameters=new, rope_scaling=None, rope_theta=None)),
    ]
    assert both == [replace(MODEL, rope_factor=8.0)] * 2


def test_fields_that_a_config_leaves_out_have_transformers_defaults() -> None:
    sparse = hf_dict()
    for name in (
        "head_dim",
        "num_key_value_heads",
        "rope_theta",
        "rope_scaling",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        del sparse[name]
    read = mapping.model_config_from_hf(sparse)
    assert (read.head_dim, read.num_kv_heads, read.rope_theta) == (4, 6, 10_000.0)
    assert (read.rope_factor, read.norm_eps, read.tied_embeddings) == (None, 1e-6, False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported"),
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures \['MixtralForCausalLM'\] is not supported"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 2.0}}, "low_freq_factor 2.0"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 8.0}}, "high_freq_factor 8.0"),
        ({"rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": 4096}}, "built in"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 4}, "num_kv_heads 4"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": "qwen2", "dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
    ],
)
def test_what_training_cannot_express_is_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told) as refused:
        mapping.model_config_from_hf(hf_dict(**changes), origin="base/config.json")
    assert "base/config.json" in str(refused.value) and refused.value.fix


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in NUMBERS for value in (None, "12", [], {}, True, -1, math.nan)),
        *({name: 0} for name in NUMBERS),
        *({name: math.inf} for name in ("rope_theta", "rms_norm_eps", "initializer_range")),
        *({name: value} for name in ("num_key_value_heads", "head_dim") for value in ("3", [], {}, True, -1, 1.5)),
        *({"tie_word_embeddings": value} for value in (None, "yes", 1, [])),
        *({"model_type": value} for value in (None, [], {}, 5)),
        *({"layer_types": value} for value in (5, "full_attention", [[]], ["full_attention"], {"full_attention": 1})),
        *({"rope_scaling": {**LLAMA3_SCALING, "factor": value}} for value in (None, "8", 0, -8.0, math.nan, math.inf)),
        *({"rope_scaling": value} for value in ("llama3", ["llama3"], 8.0)),
        {"rope_scaling": None, "rope_parameters": {"full_attention": {**LLAMA3_SCALING, "rope_theta": 1e4}}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": "1e4"}},
        {"attention_bias": None},
    ],
    ids=str,
)
def test_a_field_of_another_kind_or_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"base/config\.json") as refused:
        mapping.model_config_from_hf(hf_dict(**changes), origin="base/config.json")
    assert refused.value.fix


@pytest.mark.parametrize("name", ["rope_theta", "rope_factor", "norm_eps", "init_std"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_model_has_finite_numbers_above_0(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"model.{name} {value} is no finite number above 0"):
        replace(MODEL, **{name: value})


def test_a_model_like_no_family_is_refused() -> None:
    with pytest.raises(BadInput, match=r"qkv_bias and model\.qk_norm are both on"):
        mapping.hf_shapes(replace(MODEL, qkv_bias=True, qk_norm=True))


def test_a_qwen3_without_head_dim_has_transformers_default() -> None:
    config = hf_dict(QWEN3)
    del config["head_dim"]
    assert mapping.model_config_from_hf(config).head_dim == 128


def test_a_config_without_a_needed_field_is_refused() -> None:
    config = hf_dict()
    del config["hidden_size"]
    with pytest.raises(BadInput, match="hidden_size"):
        mapping.model_config_from_hf(config)
