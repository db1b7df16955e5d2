"""What OpenRLHF's policy loss makes of our settings: clipping, importance weights, vllm_kl."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.test_rl_command import CONFIG, parsed

UNCHANGED = [-1.0, -1.0, -1.0, -1.0]


@pytest.fixture
def loss(openrlhf_loss: Any) -> Any:
    """The loss as OpenRLHF's actor makes it of our command line."""
    arguments = parsed(replace(CONFIG, clip_low=0.2, clip_high=0.2), cuda=False)
    actor, correction = arguments["actor"], arguments["algo"]["advantage"]
    return openrlhf_loss.PolicyLoss(
        *actor["eps_clip_low_high"],
        actor["dual_clip"],
        token_level_loss=actor["loss_agg_mode"] == "token-mean",
        policy_loss_type=actor["policy_loss_type"],
        **{f"is_correction_{name}": correction[f"is_correction_{name}"] for name in ("level", "mode", "threshold")},
    )


def of(loss: Any, now: list[float], old: list[float], vllm: list[float], advantage: float) -> tuple[float, ...]:
    """(loss, clip share, KL of the policy, vllm_kl, share of clipped importance weights) of one response."""
    one = torch.ones(1, len(now))
    tensors = (torch.tensor([each]) for each in (now, old))
    return tuple(map(float, loss(*tensors, advantage * one, action_mask=one, rollout_log_probs=torch.tensor([vllm]))))


def test_equal_log_probabilities_have_no_vllm_kl_and_nothing_is_clipped(loss: Any) -> None:
    assert of(loss, UNCHANGED, UNCHANGED, UNCHANGED, 2.0) == (-2.0, 0.0, 0.0, 0.0, 0.0)


def test_the_ratio_of_the_policies_is_clipped_at_a_fifth(loss: Any) -> None:
    now = [-1 + math.log(ratio) for ratio in (1.1, 1.5, 0.9, 0.5)]
    value, clipped, *_ = of(loss, now, UNCHANGED, UNCHANGED, 1.0)
    assert value == pytest.approx(-(1.1 + 1.2 + 0.9 + 0.5) / 4) and clipped == 0.25
    value, clipped, *_ = of(loss, now, UNCHANGED, UNCHANGED, -1.0)
    assert value == pytest.approx((1.1 + 1.5 + 0.9 + 0.8) / 4) and clipped == 0.25


def test_each_token_has_its_importance_weight_which_is_clipped(loss: Any) -> None:
    vllm = [-1 - math.log(weight) for weight in (2.0, 0.8, 100.0, 0.01)]  # the trainer's probability / vLLM's
    value, _, _, vllm_kl, clipped = of(loss, UNCHANGED, UNCHANGED, vllm, 1.0)
    assert value == pytest.approx(-(2.0 + 0.8 + 5.0 + 0.5) / 4) and clipped == 0.5
    assert vllm_kl == pytest.approx(-math.log(2.0 * 0.8 * 100.0 * 0.01) / 4)


def test_vllm_kl_is_the_mean_shift_of_the_log_probabilities(loss: Any) -> None:
    assert of(loss, UNCHANGED, UNCHANGED, [each + 0.03 for each in UNCHANGED], 1.0)[3] == pytest.approx(0.03)
