"""The arithmetic behind mfu."""

from __future__ import annotations

import pytest

from megatron_octo.config.load import load_recipe
from megatron_octo.config.train import MidTrainConfig
from megatron_octo.model.flops import peak_flops, train_flops_per_token
from tests.conftest import REPOSITORY
from tests.prepared import MODEL


def test_a_token_costs_six_a_weight_and_half_of_the_attention_square():
    norms = MODEL.hidden_size * (2 * MODEL.num_layers + 1)
    matrices = MODEL.num_parameters - norms  # tied: the one embedding matrix is the output layer's product
    attention = MODEL.num_layers * 2 * MODEL.hidden_size * 128 / 2
    assert train_flops_per_token(MODEL, 128) == 6 * (matrices + attention)


@pytest.mark.parametrize(("file", "flops"), [("llama32_1b", 9.03e9), ("llama32_3b", 2.35e10), ("llama31_8b", 5.15e10)])
def test_a_llamas_token_costs_what_published_utilisation_is_counted_with(file, flops):
    """Causal attention counted once, as NVIDIA does: 14,451 tokens/s of the 8B are the 744 TFLOP/s it publishes."""
    config = load_recipe(f"{REPOSITORY}/recipes/{file}.py:stable_200b", MidTrainConfig)
    assert train_flops_per_token(config.model, config.data.seq_length) == pytest.approx(flops, rel=1e-3)


def test_the_peak_of_a_gpu_is_known_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA B200") == 2250e12
    assert peak_flops("NVIDIA GB200") == 2500e12
    assert peak_flops("some other device") is None
