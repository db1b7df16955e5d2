"""The stand-in for Transformer Engine's fused Adam takes the steps of torch's AdamW."""

from __future__ import annotations

import pytest

from megatron_octo.platform.fused_adam import fused_adam_class

torch = pytest.importorskip("torch", reason="torch is not installed: make setup")

NUMBERS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _train(optimizer_class: type) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(17, 5)), torch.nn.Parameter(torch.randn(9))]
    optimizer = optimizer_class(params, **NUMBERS)
    for _ in range(20):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return params


def test_twenty_steps_equal_those_of_adamw():
    for ours, theirs in zip(_train(fused_adam_class()), _train(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_step_count_is_in_the_group_and_the_moments_with_the_parameter():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fused_adam_class()([param], **NUMBERS)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
