"""The arithmetic behind mfu."""

from __future__ import annotations

from megatron_octo.model.flops import peak_flops, train_flops_per_token
from tests.prepared import MODEL


def test_a_token_costs_six_a_weight_and_half_of_the_attention_square():
    norms = MODEL.hidden_size * (2 * MODEL.num_layers + 1)
    matrices = MODEL.num_parameters - norms  # tied: the one embedding matrix is the output layer's product
    attention = MODEL.num_layers * 2 * MODEL.hidden_size * 128 / 2
    assert train_flops_per_token(MODEL, 128) == 6 * (matrices + attention)


def test_the_peak_of_a_gpu_is_known_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("some other device") is None
