"""The table between Hugging Face and megatron: names, shapes, joins, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from megatron_octo.config.model import ModelConfig
from megatron_octo.errors import BadInput
from megatron_octo.model import mapping

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
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_dict(**changes: Any) -> dict[str, Any]:
    return {**mapping.hf_config(MODEL, dtype="bfloat16", bos=1, eos=2), **changes}


def weight(name_part: str) -> mapping.Weight:
    return next(each for each in mapping.weights(MODEL) if name_part in each.key)


def test_every_tensor_of_transformers_llama_has_its_place() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for model in (MODEL, replace(MODEL, tied_embeddings=True)):
        with torch.device("meta"):
            theirs = LlamaForCausalLM(LlamaConfig(**mapping.hf_config(model, dtype="float32")))
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
    for each in mapping.weights(MODEL):
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
def test_settings_survive_the_way_there_and_back(factor: float | None, tied: bool) -> None:
    model = replace(MODEL, rope_factor=factor, tied_embeddings=tied, norm_eps=1e-6, rope_theta=10_000.0)
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
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
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
    ],
)
def test_what_training_cannot_express_is_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told) as refused:
        mapping.model_config_from_hf(hf_dict(**changes), origin="base/config.json")
    assert "base/config.json" in str(refused.value) and refused.value.fix


def test_a_model_with_biases_is_refused_rather_than_converted_without_them() -> None:
    with pytest.raises(BadInput, match="qkv_bias"):
        mapping.hf_shapes(replace(MODEL, qkv_bias=True))


def test_a_config_without_a_needed_field_is_refused() -> None:
    config = hf_dict()
    del config["hidden_size"]
    with pytest.raises(BadInput, match="hidden_size"):
        mapping.model_config_from_hf(config)
